"""The routes of the reward server over real sockets, with a stand-in for the model."""

import asyncio
import base64
import io
import json
import math
import struct
import threading
import time
import zlib
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import aiohttp
import numpy as np
import pytest
import torch
from aiohttp import web
from PIL import Image, ImageDraw, ImageFile, ImageFont

from lit_rl.rewards.client import HTTPReward
from lit_rl.rewards.ocr import OCRReward
from lit_rl.rewards.pseudo import PseudoReward
from lit_rl.rewards.service.app import Limits, RewardApp, make_runner
from lit_rl.rewards.service.batching import Model
from lit_rl.rewards.service.images import decode_base64, decode_image, decode_mask
from lit_rl.rewards.service.samples import SampleError
from lit_rl.rewards.service.scorers import score_samples
from lit_rl.rewards.service.wire import decode_answer, encode_batch

RNG = np.random.default_rng(0)
BINARY = {"Content-Type": "application/octet-stream"}


def picture(height: int = 8, width: int = 8) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(image: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, options.pop("format", "PNG"), **options)
    return file.getvalue()


def single(data: bytes, prompt: str = "a cat") -> dict[str, str]:
    return {"image": base64.b64encode(data).decode(), "prompt": prompt}


def bright(images: Any, infos: Any) -> list[dict[str, Any] | SampleError]:
    """A model: the mean of the pixels; NaN where the prompt says so."""
    return [{"bright": math.nan if i["prompt"] == "nan" else float(x.mean()) / 255, "note": i["prompt"]} for x, i in zip(images, infos)]


class Gate:
    """A model that waits until it is opened and notes the sizes of its batches."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.entered = threading.Event()
        self.batches: list[int] = []

    def __call__(self, images: Any, infos: Any) -> list[dict[str, Any] | SampleError]:
        self.batches.append(len(images))
        self.entered.set()
        assert self.open.wait(60)
        return bright(images, infos)


@asynccontextmanager
async def served(
    model: Model | None = bright, *, token: str | None = None, **limits: Any
) -> AsyncIterator[tuple[RewardApp, aiohttp.ClientSession]]:
    """A server on a free port and a client session whose base URL it is."""
    app = RewardApp(Limits(**limits), token=token)
    runner = make_runner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    if model is not None:
        app.batcher.start(model)
    host, port = runner.addresses[0][:2]
    try:
        async with aiohttp.ClientSession(f"http://{host}:{port}", timeout=aiohttp.ClientTimeout(15)) as session:
            yield app, session
    finally:
        await runner.cleanup()


async def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it never happened"
        await asyncio.sleep(0.005)


def aio(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test in a loop of its own."""

    def run(**arguments: Any) -> None:
        asyncio.run(test(**arguments))

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    names = test.__code__.co_varnames[: test.__code__.co_argcount]
    if names:
        import inspect

        run.__signature__ = inspect.signature(test)  # type: ignore[attr-defined]
    return run


async def error_of(response: aiohttp.ClientResponse) -> tuple[int, str]:
    """Status and code; every error carries the whole envelope."""
    error = (await response.json())["error"]
    assert set(error) == {"code", "message", "details", "request_id"}
    assert error["message"] and error["request_id"] == response.headers["X-Request-Id"]
    return response.status, error["code"]


@aio
async def test_single_route_speaks_the_documented_json() -> None:
    def guide(images: Any, infos: Any) -> list[Any]:
        return [{"vlm_score": 0.85, "ocr_confidence": 0.92, "ocr_similarity": 1.0, "ocr_text": "x"} for _ in images]

    async with served(guide) as (_, session):
        for body in (single(png(picture())), {**single(png(picture())), "timestep": "7"}):
            async with session.post("/score", json=body) as r:
                assert r.status == 200 and r.content_type == "application/json"
                assert await r.json() == {"vlm_score": 0.85, "ocr_confidence": 0.92, "ocr_similarity": 1.0, "ocr_text": "x"}


@aio
async def test_single_route_keeps_its_keys_when_nothing_computes_them() -> None:
    async with served() as (_, session), session.post("/score", json=single(png(picture()), "nan")) as r:
        assert await r.json() == {
            "vlm_score": None,
            "ocr_confidence": None,
            "ocr_similarity": None,
            "ocr_text": None,
            "bright": None,
            "note": "nan",
        }


@aio
async def test_single_route_decodes_losslessly() -> None:
    seen: list[np.ndarray] = []

    def keep(images: Any, infos: Any) -> list[Any]:
        seen.extend(images)
        return bright(images, infos)

    image = picture(5, 7)
    grey, alpha = image[..., 0], np.dstack([image, np.full((5, 7), 0, np.uint8)])
    bodies = [png(image), png(image, format="WEBP", lossless=True), png(grey), png(alpha)]
    async with served(keep) as (_, session):
        for data in bodies:
            async with session.post("/score", json=single(data)) as r:
                assert r.status == 200
        async with session.post("/score", json={"image": "data:image/png;base64," + single(png(image))["image"], "prompt": ""}) as r:
            assert r.status == 200
    wanted = [image, image, np.dstack([grey] * 3), np.full((5, 7, 3), 255), image]  # transparent becomes white
    for got, want in zip(seen, wanted, strict=True):
        np.testing.assert_array_equal(got, want)


@aio
async def test_batch_route_answers_in_order_with_errors_beside() -> None:
    images = [np.full((4, 6, 3), 51, np.uint8), picture(40, 40), np.full((2, 2, 3), 255, np.uint8), picture(3, 3)]
    async with served(max_pixels=1000) as (_, session):
        body = encode_batch(images, ["a", "b", "c", "nan"], request_id="r-7")
        async with session.post("/v1/score_batch", data=body, headers=BINARY | {"X-Batch-Size": "4"}) as r:
            assert r.status == 200
            text = await r.text()
        answer = json.loads(text)
        assert answer["request_id"] == "r-7"
        assert answer["scores"][0] == {"bright": pytest.approx(0.2), "note": "a"} and answer["scores"][2]["bright"] == 1.0
        assert answer["scores"][1] is None and answer["errors"]["1"]["code"] == "too_many_pixels"
        rows, errors = decode_answer(text, 4)
        assert rows[3] is not None and math.isnan(rows[3]["bright"]) and set(errors) == {1}


@aio
async def test_targets_and_masks_reach_the_scorer() -> None:
    seen: list[Any] = []

    def keep(images: Any, infos: Any) -> list[Any]:
        seen.extend(infos)
        return bright(images, infos)

    mask = np.zeros((8, 8), np.uint8)
    mask[2:4] = 255
    async with served(keep) as (_, session):
        body = encode_batch([picture()] * 2, ["a", "b"], request_id="", masks=[mask, mask], targets=["x", None])
        async with session.post("/v1/score_batch", data=body, headers=BINARY) as r:
            assert r.status == 200
        drawn = np.zeros((8, 8, 4), np.uint8)
        drawn[2:4] = (255, 0, 0, 255)  # red on a transparent layer
        for shape, target in ((mask, "y"), (drawn, 42)):
            one = {**single(png(picture())), "mask": single(png(shape))["image"], "target": target}
            async with session.post("/score", json=one) as r:
                assert r.status == 200
    assert [i.get("target") for i in seen] == ["x", None, "y", "42"]
    for info in seen:
        np.testing.assert_array_equal(info["mask"], mask)


@aio
async def test_an_empty_mask_spoils_its_own_image_only_and_a_wrong_size_is_named() -> None:
    white, black = np.full((8, 8), 255, np.uint8), np.zeros((8, 8), np.uint8)
    async with served() as (app, session):
        body = encode_batch([picture()] * 3, ["a", "b", "c"], request_id="", masks=[white, black, white])
        async with session.post("/v1/score_batch", data=body, headers=BINARY) as r:
            answer = await r.json()
        assert [row is None for row in answer["scores"]] == [False, True, False]
        assert answer["errors"] == {"1": {"code": "bad_mask", "message": "`mask` is all zero; it must be above 0 where the text is"}}
        body = encode_batch([picture()], ["a"], request_id="", masks=[white[:4]])
        async with session.post("/v1/score_batch", data=body, headers=BINARY) as r:
            assert await error_of(r) == (422, "bad_batch")
        for mask, words in ((black, "is all zero"), (white[:4], "is [4, 8], its image [8, 8]")):
            async with session.post("/score", json=single(png(picture())) | {"mask": single(png(mask))["image"]}) as r:
                assert await error_of(r) == (422, "bad_mask") and words in await r.text()
        assert app.batcher.images == 0


@pytest.mark.parametrize("route", ["batch", "single"])
@aio
async def test_the_masked_part_alone_is_read_from_trainer_to_server(route: str) -> None:
    """The right text elsewhere counts nothing, the wrong text elsewhere costs nothing; the confidence is answered beside."""
    canvases = [Image.new("RGB", (96, 64), "white") for _ in range(2)]
    font = ImageFont.load_default(18)
    for canvas, (inside, outside) in zip(canvases, [("47", "812"), ("812", "47")]):
        ImageDraw.Draw(canvas).text((30, 36), inside, fill="black", font=font)
        ImageDraw.Draw(canvas).text((10, 4), outside, fill="black", font=font)
    mask = torch.zeros(64, 96, dtype=torch.uint8)
    mask[34:60, 24:72] = 255
    media = torch.from_numpy(np.stack([np.asarray(canvas) for canvas in canvases])).permute(0, 3, 1, 2)
    info = [{"prompt": "The text is 'say \"47\"'.", "target": "47", "mask": mask}] * 2
    async with served(partial(score_samples, [OCRReward()])) as (_, session):
        reward = HTTPReward(str(session._base_url), ["ocr_similarity", "ocr_confidence"], route=route)  # type: ignore[arg-type]
        scores = await reward.score_async(media, info)
        await reward.close()
    assert scores["ocr_similarity"].tolist() == [1.0, 0.0]
    assert (scores["ocr_confidence"] > 0.5).all()


@aio
async def test_one_failing_image_spoils_no_other() -> None:
    class Picky(PseudoReward):
        def score(self, media: Any, info: Any) -> Any:
            if any(row["prompt"] == "bad" for row in info):
                raise RuntimeError("secret detail")
            return super().score(media, info)

    async with served(partial(score_samples, [Picky()])) as (_, session):
        body = encode_batch([picture()] * 3, ["a", "bad", "c"], request_id="")
        async with session.post("/v1/score_batch", data=body, headers=BINARY) as r:
            text = await r.text()
        rows, errors = decode_answer(text, 3)
        assert [row is None for row in rows] == [False, True, False] and set(errors) == {1}
        assert "model_error" in errors[1] and "secret detail" not in text
        async with session.post("/score", json=single(png(picture()), "bad")) as r:
            assert await error_of(r) == (500, "model_error")


@aio
async def test_a_score_does_not_depend_on_its_batch_or_route() -> None:
    """Every image alone by /score, all at once by the batch route, and shuffled in several requests at once."""
    images = [picture(8, 8 + 4 * (i % 2)) for i in range(12)]
    prompts = [f"p{i}" for i in range(12)]
    async with served(partial(score_samples, [PseudoReward(seed=3)]), max_batch=5) as (_, session):

        async def batch(rows: list[int]) -> list[float]:
            body = encode_batch([images[i] for i in rows], [prompts[i] for i in rows], request_id="")
            async with session.post("/v1/score_batch", data=body, headers=BINARY) as r:
                return [row["pseudo"] for row in (await r.json())["scores"]]

        async def alone(i: int) -> float:
            async with session.post("/score", json=single(png(images[i]), prompts[i])) as r:
                return (await r.json())["pseudo"]

        singles = [await alone(i) for i in range(12)]
        assert len(set(singles)) == 12
        assert await batch(list(range(12))) == singles
        order = RNG.permutation(12).tolist()
        parts = await asyncio.gather(*(batch(order[k : k + 3]) for k in range(0, 12, 3)), *(alone(i) for i in order[:4]))
        assert [x for part in parts[:4] for x in part] == [singles[i] for i in order]  # type: ignore[union-attr]


@aio
async def test_the_real_ocr_behind_both_routes() -> None:
    image = Image.new("RGB", (32, 16), "white")
    ImageDraw.Draw(image).text((16, 8), "47", font=ImageFont.load_default(13), fill="black", anchor="mm")
    async with served(partial(score_samples, [OCRReward()])) as (_, session):
        async with session.post("/score", json=single(png(np.asarray(image)), 'the number "47"')) as r:
            alone = await r.json()
        body = encode_batch([np.asarray(image)] * 2, ['the number "47"', 'the number "41"'], request_id="")
        async with session.post("/v1/score_batch", data=body, headers=BINARY) as r:
            together = (await r.json())["scores"]
    assert alone["vlm_score"] is None and alone["ocr_text"].strip() == "47"
    assert (alone["ocr_similarity"], together[1]["ocr_similarity"]) == (1.0, 0.5)
    assert {k: v for k, v in alone.items() if k != "vlm_score"} == together[0]
    assert alone["ocr_confidence"] > 0.5


@aio
async def test_what_is_queued_is_taken_together_and_a_lone_request_does_not_wait() -> None:
    gate = Gate()
    async with served(gate, max_batch=8) as (app, session):
        first = asyncio.create_task(session.post("/score", json=single(png(picture()))))
        await until(gate.entered.is_set)
        rest = [asyncio.create_task(session.post("/score", json=single(png(picture())))) for _ in range(11)]
        await until(lambda: app.batcher.images == 12)
        await asyncio.sleep(0.1)
        gate.open.set()
        assert [r.status for r in await asyncio.gather(first, *rest)] == [200] * 12
    assert gate.batches == [1, 8, 3]


@aio
async def test_overload_is_429_with_retry_after_and_counts_images() -> None:
    gate = Gate()
    async with served(gate, max_queue_images=4) as (app, session):
        body = encode_batch([picture()] * 3, ["a"] * 3, request_id="")
        held = asyncio.create_task(session.post("/v1/score_batch", data=body, headers=BINARY | {"X-Batch-Size": "3"}))
        await until(gate.entered.is_set)
        for headers in ({"X-Batch-Size": "3"}, {}):  # announced, and found out after the upload
            async with session.post("/v1/score_batch", data=body, headers=BINARY | headers) as r:
                assert await error_of(r) == (429, "queue_full") and int(r.headers["Retry-After"]) >= 1
        assert app.batcher.images == 3
        async with session.get("/health") as r:
            assert (await r.json())["queue_images"] == 3
        gate.open.set()
        assert (await held).status == 200
        async with session.post("/v1/score_batch", data=body, headers=BINARY) as r:
            assert r.status == 200
        async with session.post("/v1/score_batch", data=body, headers=BINARY | {"X-Batch-Size": "5"}) as r:
            assert await error_of(r) == (413, "too_large")  # would never fit
        assert app.batcher.images == 0


@aio
async def test_bytes_held_in_memory_are_bounded_too() -> None:
    gate = Gate()
    body = encode_batch([picture(64, 64)], ["a"], request_id="")
    async with served(gate, max_held_bytes=int(len(body) * 1.5)) as (_, session):
        held = asyncio.create_task(session.post("/v1/score_batch", data=body, headers=BINARY))
        await until(gate.entered.is_set)
        async with session.post("/v1/score_batch", data=body, headers=BINARY) as r:
            assert await error_of(r) == (429, "queue_full")
        gate.open.set()
        assert (await held).status == 200


@aio
async def test_retry_after_is_the_queue_over_the_measured_rate() -> None:
    async with served() as (app, _):
        assert app.batcher.retry_after() == 1  # nothing measured yet
        app.batcher.rate, app.batcher.images = 2.0, 9
        assert app.batcher.retry_after() == 5
        app.batcher.rate = 0.001
        assert app.batcher.retry_after() == 60
        app.batcher.images = 0


@aio
async def test_deadline_answers_504_and_drops_what_was_not_started() -> None:
    gate = Gate()
    async with served(gate) as (app, session):
        first = asyncio.create_task(session.post("/score", json=single(png(picture()))))
        await until(gate.entered.is_set)
        async with session.post("/score", json=single(png(picture())), headers={"X-Deadline-Ms": "50"}) as r:
            assert await error_of(r) == (504, "deadline")
        gate.open.set()
        assert (await first).status == 200
        async with session.post("/score", json=single(png(picture())), headers={"X-Deadline-Ms": "5000"}) as r:
            assert r.status == 200
        assert gate.batches == [1, 1] and app.batcher.images == 0


@aio
async def test_a_caller_who_leaves_is_not_scored() -> None:
    gate = Gate()
    async with served(gate) as (app, session):
        first = asyncio.create_task(session.post("/score", json=single(png(picture()))))
        await until(gate.entered.is_set)
        gone = asyncio.create_task(session.post("/score", json=single(png(picture()))))
        await until(lambda: app.batcher.images == 2)
        gone.cancel()
        await until(lambda: app.batcher.images == 1)
        gate.open.set()
        assert (await first).status == 200
        async with session.post("/score", json=single(png(picture()))) as r:
            assert r.status == 200
    assert gate.batches == [1, 1]


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "x", "", "99999999999", "٣"])
@pytest.mark.parametrize("header", ["X-Batch-Size", "X-Deadline-Ms"])
@aio
async def test_headers_that_are_no_whole_numbers(header: str, value: str) -> None:
    async with served() as (app, session):
        async with session.post("/v1/score_batch", data=b"", headers=BINARY | {header: value}) as r:
            assert await error_of(r) == (400, "bad_header")
        assert app.batcher.images == 0


@aio
async def test_loading_and_draining_are_503() -> None:
    async with served(None) as (app, session):
        for state in ("loading", "draining"):
            app.batcher.state = state  # type: ignore[assignment]
            async with session.post("/score", json=single(png(picture()))) as r:
                assert await error_of(r) == (503, state) and r.headers["Retry-After"] == "5"
            async with session.get("/health") as r:
                assert r.status == 503 and (await r.json())["status"] == state


@aio
async def test_drain_finishes_what_was_admitted() -> None:
    gate = Gate()
    async with served(gate, max_batch=4) as (app, session):
        held = [asyncio.create_task(session.post("/score", json=single(png(picture())))) for _ in range(20)]
        await until(lambda: app.batcher.images == 20)
        drained = asyncio.create_task(app.batcher.drain(10))
        await until(lambda: app.batcher.state == "draining")
        async with session.post("/score", json=single(png(picture()))) as r:
            assert await error_of(r) == (503, "draining")
        gate.open.set()
        assert [r.status for r in await asyncio.gather(*held)] == [200] * 20
        assert await drained


@aio
async def test_drain_gives_up() -> None:
    gate = Gate()
    async with served(gate) as (app, session):
        held = asyncio.create_task(session.post("/score", json=single(png(picture()))))
        await until(gate.entered.is_set)
        assert not await app.batcher.drain(0.05)
        gate.open.set()
        assert (await held).status == 200


def bomb(width: int, height: int) -> bytes:
    """A valid 1-bit-per-pixel-cheap PNG of any size: 8-bit grey zeros compress a thousandfold."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compressobj(9)
    data = b"".join(rows.compress(bytes(width + 1)) for _ in range(min(height, 3000))) + rows.flush()
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
        + chunk(b"IDAT", data)
        + chunk(b"IEND", b"")
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@aio
async def test_a_png_bomb_is_refused_without_being_inflated(monkeypatch: pytest.MonkeyPatch) -> None:
    def inflate(file: ImageFile.ImageFile) -> None:
        raise AssertionError(f"a picture of {file.size} is inflated")

    monkeypatch.setattr(ImageFile.ImageFile, "load", inflate)
    async with served() as (_, session):
        for width, height in ((3000, 3000), (13000, 13000), (60000, 60000)):
            async with session.post("/score", json=single(bomb(width, height))) as r:
                assert await error_of(r) == (413, "too_many_pixels")


IMAGE = picture(16, 16)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG"])
def test_pictures_and_masks_are_upright_and_noise_is_no_mask(kind: str) -> None:
    """A picture and its mask taken sideways (EXIF 6); black around an edge of a lossy mask is not exactly black."""
    exif = Image.Exif()
    exif[0x0112] = 6
    box = np.zeros((32, 48), np.uint8)
    box[8:16, 16:32] = 255
    options = {"exif": exif} | ({} if kind == "PNG" else {"quality": 70})
    data = png(np.rot90(box).copy(), format=kind, **options)
    assert np.array_equal(decode_mask(data, max_pixels=1 << 20), box)
    assert np.abs(decode_image(data, max_pixels=1 << 20).astype(int) - box[..., None]).mean() < 12
    assert np.array_equal(decode_mask(png(box // 255), max_pixels=1 << 20), box), "0 and 1 of a file without losses"


def test_base64_as_tools_write_it() -> None:
    data = bytes(range(256))
    for text in (
        base64.encodebytes(data).decode(),
        base64.b64encode(data).decode() + "\r\n",
        base64.encodebytes(data).decode().replace("\n", "\r\n"),
    ):
        assert decode_base64(text) == decode_base64(f"data:image/png;base64,{text}") == decode_base64(f"\nDATA:;base64,\n{text}") == data
    for text in ("a*b=", "abc"):
        with pytest.raises(SampleError, match="not base64"):
            decode_base64(text)


@pytest.mark.parametrize(
    "data",
    {
        "empty": b"",
        "text": b"hello",
        "truncated": png(IMAGE)[:-300],
        "header only": png(IMAGE)[:33],
        "gif": png(IMAGE, format="GIF"),
        "tiff": png(IMAGE, format="TIFF"),
        "bmp": png(IMAGE, format="BMP"),
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "palette": png(IMAGE[..., 0] > 100),  # 1 bit
        "16 bit": png(IMAGE[..., 0].astype(np.uint16) * 257),
        "animated": png(IMAGE, format="WEBP", save_all=True, append_images=[Image.fromarray(255 - IMAGE)]),
        "cmyk": (lambda f: (Image.new("CMYK", (4, 4)).save(f, "JPEG"), f.getvalue())[1])(io.BytesIO()),
    }.items(),
    ids=lambda item: item[0],
)
@aio
async def test_images_that_are_refused(data: tuple[str, bytes]) -> None:
    async with served() as (_, session), session.post("/score", json=single(data[1])) as r:
        assert await error_of(r) == (422, "bad_image")


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, "bad_json"),
        (b"{", 400, "bad_json"),
        (b"\xff\xfe", 400, "bad_json"),
        (b"[" * 100_000, 400, "bad_json"),
        (b"[]", 422, "bad_request"),
        (b'{"prompt": "x"}', 422, "bad_request"),
        (b'{"image": "aGk="}', 422, "bad_request"),
        (b'{"image": 3, "prompt": "x"}', 422, "bad_request"),
        (b'{"image": "aGk=", "prompt": ["x"]}', 422, "bad_request"),
        (b'{"image": "aGk=", "prompt": "x", "mask": 1}', 422, "bad_request"),
        (b'{"image": "aGk=", "prompt": "\\ud800"}', 422, "bad_request"),
        (json.dumps({"image": "aGk=", "prompt": "x" * 100_000}).encode(), 422, "bad_request"),
        (b'{"image": "!!!", "prompt": "x"}', 422, "bad_image"),
    ],
)
@aio
async def test_json_that_is_refused(body: bytes, status: int, code: str) -> None:
    async with served() as (app, session):
        async with session.post("/score", data=body, headers={"Content-Type": "application/json"}) as r:
            assert await error_of(r) == (status, code)
        assert app.batcher.images == 0


@pytest.mark.parametrize("body", [b"", b"\x80\x04K\x01.", (1 << 40).to_bytes(8, "little") + b"{}"])
@aio
async def test_bodies_that_are_no_safetensors(body: bytes) -> None:
    async with served() as (_, session), session.post("/v1/score_batch", data=body, headers=BINARY) as r:
        assert await error_of(r) == (422, "bad_batch")


@aio
async def test_announced_and_real_batch_size_must_agree() -> None:
    body = encode_batch([picture()] * 2, ["a", "b"], request_id="")
    async with served() as (_, session), session.post("/v1/score_batch", data=body, headers=BINARY | {"X-Batch-Size": "1"}) as r:
        assert await error_of(r) == (422, "bad_batch")


@aio
async def test_large_bodies_are_refused_announced_or_chunked() -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(64):
            yield bytes(1 << 14)

    async with served(max_body_bytes=1 << 18) as (app, session):
        for data in (bytes(1 << 20), chunks()):
            async with session.post("/v1/score_batch", data=data, headers=BINARY) as r:
                assert await error_of(r) == (413, "too_large")
        assert app.batcher.images == 0


async def raw(session: aiohttp.ClientSession, text: bytes) -> tuple[bytes, asyncio.StreamWriter]:
    """Send bytes on a connection of its own and read the status line."""
    assert session._base_url is not None
    reader, writer = await asyncio.open_connection("127.0.0.1", session._base_url.port)
    writer.write(text)
    await writer.drain()
    return await asyncio.wait_for(reader.readline(), 60), writer


@aio
async def test_a_slow_body_is_408_and_gives_its_place_back() -> None:
    async with served(body_seconds=0.2) as (app, session):
        head = b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"
        status, writer = await raw(session, head)
        assert b"408" in status
        writer.close()
        await until(lambda: app.batcher.images == 0)


@aio
async def test_many_slow_bodies_do_not_keep_others_waiting() -> None:
    async with served(body_seconds=50.0) as (_, session):
        head = b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"
        host, port = session._base_url.host, session._base_url.port  # type: ignore[union-attr]
        slow = [await asyncio.open_connection(host, port) for _ in range(100)]
        for _, writer in slow:
            writer.write(head)
        await asyncio.sleep(0.1)
        async with session.post("/score", json=single(png(picture()))) as r:
            assert r.status == 200
        assert not any(reader.at_eof() or reader._buffer for reader, _ in slow), "they are still waited for"  # type: ignore[attr-defined]
        for _, writer in slow:
            writer.close()


@aio
async def test_compressed_and_foreign_content_types_are_415() -> None:
    async with served() as (_, session):
        tries = [
            ("/score", {"Content-Type": "text/plain"}),
            ("/score", {"Content-Type": "application/x-www-form-urlencoded"}),
            ("/score", {"Content-Type": "application/json", "Content-Encoding": "gzip"}),
            ("/v1/score_batch", {"Content-Type": "text/json"}),
            ("/v1/score_batch", {"Content-Type": "application/x-python-pickle"}),
        ]
        for path, headers in tries:
            async with session.post(path, data=b"{}", headers=headers) as r:
                assert await error_of(r) == (415, "unsupported_media_type")


@aio
async def test_unknown_paths_and_methods_and_their_metrics() -> None:
    async with served() as (_, session):
        for i in range(5):
            async with session.get(f"/scan/{i}") as r:
                assert await error_of(r) == (404, "not_found")
        async with session.get("/score") as r:
            assert await error_of(r) == (405, "method_not_allowed")
        async with session.get("/metrics") as r:
            text = await r.text()
        assert 'reward_requests_total{route="unmatched",status="404"} 5.0' in text and "scan" not in text


@aio
async def test_an_unexpected_error_tells_nothing() -> None:
    def broken(images: Any, infos: Any) -> list[Any]:
        raise RuntimeError("secret detail")

    async with served(broken) as (app, session):
        for _ in range(2):  # the model thread survives
            async with session.post("/score", json=single(png(picture()))) as r:
                assert await error_of(r) == (500, "internal_error")
                assert "secret" not in await r.text()
        assert app.batcher.images == 0


@aio
async def test_metrics_count_what_happened() -> None:
    async with served() as (_, session):
        body = encode_batch([np.full((4, 4, 3), 51, np.uint8)] * 3, ["a", "b", "nan"], request_id="")
        async with session.post("/v1/score_batch", data=body, headers=BINARY) as r:
            assert r.status == 200
        async with session.get("/metrics") as r:
            assert r.content_type == "text/plain"
            lines = (await r.text()).splitlines()
    for line in (
        'reward_requests_total{route="/v1/score_batch",status="200"} 1.0',
        "reward_queue_images 0.0",
        "reward_batch_size_sum 3.0",
        "reward_model_seconds_count 1.0",
        "reward_decode_seconds_count 1.0",
        'reward_score_count{output="bright"} 2.0',
        'reward_unscored_total{output="bright"} 1.0',
    ):
        assert line in lines


@aio
async def test_token_guards_everything_but_health() -> None:
    async with served(token="s3cret") as (_, session):
        for headers in ({}, {"Authorization": "Bearer no"}, {"Authorization": "s3cret"}, {"Authorization": "Bearer "}):
            for method, path in (("POST", "/score"), ("POST", "/v1/score_batch"), ("GET", "/metrics")):
                async with session.request(method, path, headers=headers) as r:
                    assert await error_of(r) == (401, "unauthorized")
        async with session.get("/health") as r:
            assert r.status == 200
        async with session.post("/score", json=single(png(picture())), headers={"Authorization": "Bearer s3cret"}) as r:
            assert r.status == 200


@aio
async def test_the_callers_request_id_comes_back() -> None:
    async with served() as (_, session):
        async with session.get("/nope", headers={"X-Request-Id": "abc-1"}) as r:
            assert (await r.json())["error"]["request_id"] == "abc-1"
        async with session.get("/nope", headers={"X-Request-Id": "<script>"}) as r:
            assert "script" not in await r.text()
