"""The routes of a reward server.

POST /score           {"image": base64 PNG, "prompt": text} -> {"vlm_score", "ocr_confidence", "ocr_similarity", "ocr_text", ...};
                      optional "mask" (base64 PNG, above 0 where the text is) and "target" (the wanted text, else quoted in the prompt);
                      or {"text": answer, "prompt": text or messages, "row": {...}} -> the scores of text rewards
POST /v1/score_batch  safetensors body (lit_rl.rewards.service.wire) with images, or JSON (lit_rl.rewards.service.texts) with texts
                      -> {"scores": [...], "errors": {...}}
GET  /health          {"status": "loading | ready | draining", ...}, 200 only when ready
GET  /metrics         Prometheus text
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
from aiohttp import web
from aiohttp.log import server_logger

from lit_rl.net.guards import ApiError
from lit_rl.net.metrics import Metrics
from lit_rl.net.serving import REQUEST_ID, check_content_type, guard, in_one_line, read_body, whole_number
from lit_rl.rewards.service.batching import Batcher
from lit_rl.rewards.service.images import decode_base64, decode_image, decode_mask, mask_problem, pixel_error
from lit_rl.rewards.service.samples import Medium, Row, SampleError
from lit_rl.rewards.service.texts import TEXT_TYPE, decode_text, decode_texts
from lit_rl.rewards.service.wire import MAX_PROMPT, Batch, WireError, decode_batch, is_text, parse_json
from lit_rl.types import Answer

T = TypeVar("T")
Hold = Callable[[int, int], None]
Answered = tuple[list[Row | SampleError], str]
"""Rows in the order of the request, and its id."""
GUIDE_KEYS = ("vlm_score", "ocr_confidence", "ocr_similarity", "ocr_text")
"""Always in the answer of /score about an image; null where no reward computed them."""


@dataclass(frozen=True)
class Limits:
    """Limits of one server."""

    max_batch: int = 32
    max_queue_images: int = 256
    max_body_bytes: int = 64 << 20
    max_held_bytes: int = 1 << 30
    max_pixels: int = 2048**2
    body_seconds: float = 10.0


class RewardApp:
    """Handlers and what they share; `app` is the aiohttp application."""

    def __init__(self, limits: Limits, *, token: str | None = None, decode_threads: int = 2) -> None:
        self.limits = limits
        self.metrics = Metrics()
        self.outputs: list[str] | None = None
        """Names of the scores, once the scorers are loaded and if all of them declare theirs."""
        self.highest: dict[str, float] = {}
        """The highest value of each score that has one."""
        self.media: Sequence[Medium] = ("images", "texts")
        """The kinds of samples that its rewards score."""
        self.batcher = Batcher(
            self.metrics, max_batch=limits.max_batch, max_queue_images=limits.max_queue_images, max_bytes=limits.max_held_bytes
        )
        self._decoders = ThreadPoolExecutor(decode_threads, thread_name_prefix="decode")
        self.app = web.Application(middlewares=[guard(self.metrics, token=token)])
        self.app.router.add_post("/score", self.score)
        self.app.router.add_post("/v1/score_batch", self.score_batch)
        self.app.router.add_get("/health", self.health)
        self.app.router.add_get("/metrics", self.prometheus)
        self.app.on_cleanup.append(self._close)

    async def score(self, request: web.Request) -> web.Response:
        """The single route."""
        check_content_type(request, "application/json")
        deadline = _deadline(request)
        with self.batcher.admit(1, request.content_length or 0) as hold:
            body = await self._body(request, hold)
            hold(1, 0)
            sample, info = await self._decode(partial(_decode_single, body, max_pixels=self.limits.max_pixels), deadline)
            self._check_medium("texts" if isinstance(sample, str) else "images")
            mask = info.get("mask")
            masked = mask.nbytes if isinstance(mask, np.ndarray) else 0
            hold(0, len(body) if isinstance(sample, str) else sample.nbytes + masked)
            row = (await self.batcher.submit([sample], [info], deadline=deadline))[0]
        if isinstance(row, SampleError):
            raise ApiError(500, row.code, str(row))
        return web.json_response(({} if isinstance(sample, str) else dict.fromkeys(GUIDE_KEYS)) | _finite(row))

    async def score_batch(self, request: web.Request) -> web.Response:
        """The batched route."""
        check_content_type(request, "application/octet-stream", "application/x-safetensors", TEXT_TYPE)
        deadline, medium = _deadline(request), _medium(request)
        announced = whole_number(request, "X-Batch-Size", highest=1 << 20)
        self._check_medium(medium)
        with self.batcher.admit(announced or 1, request.content_length or 0) as hold:
            body = await self._body(request, hold)
            rows, request_id = await (self._texts if medium == "texts" else self._images)(body, announced, deadline, hold)
        errors = {str(i): {"code": row.code, "message": str(row)} for i, row in enumerate(rows) if isinstance(row, SampleError)}
        scores = [None if isinstance(row, SampleError) else _finite(row) for row in rows]
        return web.json_response({"scores": scores, "errors": errors, "request_id": request_id or request[REQUEST_ID]})

    async def _images(self, body: bytearray, announced: int | None, deadline: float | None, hold: Hold) -> Answered:
        batch = await self._decode(partial(decode_batch, body), deadline)
        _check_count(announced, len(batch.images), "images")
        hold(len(batch.images), 0)
        return await self._score(batch, deadline), batch.request_id

    async def _texts(self, body: bytearray, announced: int | None, deadline: float | None, hold: Hold) -> Answered:
        batch = await self._decode(partial(decode_texts, body), deadline)
        _check_count(announced, len(batch.texts), "texts")
        hold(len(batch.texts), len(body))
        return await self.batcher.submit(batch.texts, batch.infos, deadline=deadline), batch.request_id

    def _check_medium(self, medium: Medium) -> None:
        """422 for what no reward here scores, before it is decoded."""
        if self.batcher.state == "ready" and medium not in self.media:
            fitting = {"texts": "rules, function, reward_model or format", "images": "ocr, vlm, clip or jpeg"}[medium]
            raise ApiError(422, "wrong_medium", f"this server scores {self.media[0]}, not {medium}; start one with --scorers {fitting}")

    async def _score(self, batch: Batch, deadline: float | None) -> list[Row | SampleError]:
        """Rows in the order of the batch; images that are too large or have an empty mask are answered without being scored."""
        rows: list[Row | SampleError | None] = [pixel_error(*image.shape[:2], max_pixels=self.limits.max_pixels) for image in batch.images]
        for i, mask in enumerate(batch.masks or []):
            rows[i] = rows[i] or _mask_error(mask, batch.images[i])
        good = [i for i, row in enumerate(rows) if row is None]
        scored = await self.batcher.submit([batch.images[i] for i in good], [_info(batch, i) for i in good], deadline=deadline)
        found = dict(zip(good, scored, strict=True))
        return [found[i] if row is None else row for i, row in enumerate(rows)]

    async def health(self, request: web.Request) -> web.Response:
        """State of the queue and names of the scores; 503 while loading or draining."""
        batcher = self.batcher
        body = {
            "status": batcher.state,
            "queue_images": batcher.images,
            "max_queue_images": batcher.max_queue_images,
            "images_per_s": batcher.rate,
            "outputs": self.outputs,
            "highest": self.highest,
            "media": list(self.media),
        }
        return web.json_response(body, status=200 if batcher.state == "ready" else 503)

    async def prometheus(self, request: web.Request) -> web.Response:
        """The metrics as text."""
        return web.Response(body=self.metrics.text(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def _body(self, request: web.Request, hold: Hold) -> bytearray:
        limits = self.limits
        return await read_body(request, limit=limits.max_body_bytes, seconds=limits.body_seconds, reserve=partial(hold, 0))

    async def _decode(self, work: Callable[[], T], deadline: float | None) -> T:
        start = time.perf_counter()
        try:
            async with asyncio.timeout_at(deadline):
                return await asyncio.get_running_loop().run_in_executor(self._decoders, work)
        except TimeoutError as error:
            raise ApiError(504, "deadline", "not decoded before X-Deadline-Ms ran out") from error
        except SampleError as error:
            raise ApiError(413 if error.code == "too_many_pixels" else 422, error.code, str(error)) from error
        except WireError as error:
            raise ApiError(422, "bad_batch", str(error)) from error
        finally:
            self.metrics.decode_seconds.observe(time.perf_counter() - start)

    async def _close(self, app: web.Application) -> None:
        self.batcher.close()
        self._decoders.shutdown(wait=False, cancel_futures=True)


def make_runner(app: RewardApp) -> web.AppRunner:
    """Half-sent headers and idle connections are closed after 75 s; a caller who leaves cancels the work; bodies are never inflated."""
    server_logger.addFilter(in_one_line)
    return web.AppRunner(
        app.app, handler_cancellation=True, shutdown_timeout=5.0, access_log=None, keepalive_timeout=75.0, lingering_time=2.0,
        auto_decompress=False,
    )  # fmt: skip


def _deadline(request: web.Request) -> float | None:
    """Loop time at which the caller stops waiting (X-Deadline-Ms, counted from now)."""
    budget = whole_number(request, "X-Deadline-Ms", highest=3_600_000)
    return None if budget is None else asyncio.get_running_loop().time() + budget / 1000


def _medium(request: web.Request) -> Medium:
    return "texts" if request.content_type == TEXT_TYPE else "images"


def _check_count(announced: int | None, count: int, what: str) -> None:
    if announced is not None and announced != count:
        raise ApiError(422, "bad_batch", f"X-Batch-Size is {announced}, the body holds {count} {what}")


def _decode_single(body: bytearray, *, max_pixels: int) -> tuple[np.ndarray | Answer, dict[str, object]]:
    """The JSON of /score -> an image or a text, and its info. Unknown keys are ignored (older clients send `timestep`)."""
    try:
        request = parse_json(bytes(body), "the body")
    except WireError as error:
        raise ApiError(400, "bad_json", str(error)) from error
    if not isinstance(request, dict):
        raise ApiError(422, "bad_request", 'the body must be a JSON object {"image": base64, "prompt": text}, or {"text": ..., ...}')
    if "text" in request and "image" not in request:
        try:
            return decode_text(request)
        except WireError as error:
            raise ApiError(422, "bad_request", str(error)) from error
    return _decode_single_image(request, max_pixels=max_pixels)


def _decode_single_image(request: Mapping[str, object], *, max_pixels: int) -> tuple[np.ndarray, dict[str, object]]:
    texts: dict[str, object] = {key: request.get(key) for key in ("image", "prompt", "mask", "target")}
    if type(texts["target"]) in (int, float):  # 42 asks for "42"
        texts["target"] = None if texts["target"] in (math.inf, -math.inf) or texts["target"] != texts["target"] else str(texts["target"])
    for key, value in texts.items():
        if not isinstance(value, str) and (value is not None or key in ("image", "prompt")):
            problem = "missing" if key not in request else f"{type(value).__name__}, expected a string"
            raise ApiError(422, "bad_request", f"`{key}` is {problem}", details=[{"field": key, "problem": problem}])
    info: dict[str, object] = {"prompt": texts["prompt"]} | ({"target": texts["target"]} if texts["target"] else {})
    if not all(map(is_text, info.values())):
        raise ApiError(422, "bad_request", f"a prompt must be valid Unicode of at most {MAX_PROMPT} characters")
    image = decode_image(decode_base64(str(texts["image"])), max_pixels=max_pixels)
    if texts["mask"]:
        info["mask"] = mask = decode_mask(decode_base64(str(texts["mask"])), max_pixels=max_pixels)
        if (wrong := _mask_error(mask, image)) is not None:
            raise wrong
    return image, info


def _mask_error(mask: np.ndarray, image: np.ndarray) -> SampleError | None:
    problem = mask_problem(mask, *image.shape[:2])
    return None if problem is None else SampleError("bad_mask", f"`mask` {problem}")


def _info(batch: Batch, i: int) -> dict[str, object]:
    info: dict[str, object] = {"prompt": batch.prompts[i]}
    if batch.targets is not None and batch.targets[i] is not None:
        info["target"] = batch.targets[i]
    if batch.masks is not None:
        info["mask"] = batch.masks[i]
    return info


def _finite(row: Mapping[str, object]) -> dict[str, object]:
    """JSON has no NaN: what could not be computed is null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
