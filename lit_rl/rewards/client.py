"""Rewards from servers over HTTP: which server a rank asks, how it retries, and what it does with an image that got no score."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import math
import os
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from lit_rl.errors import ConfigError
from lit_rl.net.addresses import check_health, check_outputs, parse_urls, servers_of_rank, token_from_environment, urls_from_environment
from lit_rl.net.answers import TooMuch, read_answer, retry_after
from lit_rl.net.breaker import Breaker, ServerDown
from lit_rl.rewards.base import Reward, RewardError
from lit_rl.rewards.masks import mask_of
from lit_rl.rewards.quotes import check_targets, find_target
from lit_rl.rewards.service.wire import CONTENT_TYPE, WireError, decode_answer, encode_batch
from lit_rl.types import Info

if TYPE_CHECKING:
    import aiohttp

log = logging.getLogger(__name__)

Row = dict[str, float] | None
"""Scores of one image by the server's names; None: the server could not score it."""

ROUTES = {"batch": "/v1/score_batch", "single": "/score"}
OUTAGE = {502, 503, 504}
"""Statuses that say nobody sensible is there."""
PASSING = OUTAGE | {408, 429}
"""Statuses worth the same request again until the deadline."""
MAX_ANSWER = 1 << 20
"""Bytes of an answer beside `MAX_ROW` for each image; a server that says more is not believed."""
MAX_ROW = 1 << 16


class HTTPReward(Reward):
    """Scores from reward servers: `POST /v1/score_batch` with raw uint8, or `POST /score` (route: single) with one PNG per request.

    Retried until the deadline: connection errors, timeouts, 408, 429 (waiting as Retry-After says), 502-504. A body that is no answer
    is retried twice, 500 once, other statuses never. What remains without a score is NaN, counted in `counters()`, and explained in
    `last_error`. The wanted text (`quotes.find_target`) and `mask` of a
    prompt go with the image where there are any. docs/rewards.md has the protocol.

    Args:
        urls: `http://host:port`, bare `host:port`, or a range of ports `host:8000-8003`, several in a list or after commas. Default: what
            the environment says: $REWARD_SERVER_URLS, else one port per process from $REWARD_SERVER_HOST:$REWARD_SERVER_PORT on
            (127.0.0.1:8000).
        outputs: Names of the scores to use, or {name here: name at the server}. The first counts where the run gives no weights.
        mapping: Which servers a process asks. `rank`: process i server i, fewer servers are shared evenly; `round_robin`: all of them,
            starting at its own; `auto`: as `rank`, and with more servers than processes every n-th.
        route: `batch` sends raw uint8 to /v1/score_batch, `single` one PNG per request to /score.
        images_per_request: Images in one request of route batch.
        concurrency: Requests in flight per server.
        timeout_s: Seconds of one try.
        deadline_s: Seconds of one request with all its retries, counted from its first try or, if earlier, from when its server was given
            up as down.
        breaker_after: After so many failures in a row a server is asked only for /health until it answers.
        probe_s: Seconds between two such questions.
        spill: A process whose servers are down asks the others'.
        token_env: Environment variable with a bearer token; unset = none.
    """

    remedy = "look at the reward server's log; raise HTTPReward's deadline_s or timeout_s if it is slow"

    def __init__(
        self,
        urls: str | list[str] | None = None,
        outputs: Sequence[str] | Mapping[str, str] = ("ocr_similarity",),
        mapping: Literal["auto", "rank", "round_robin"] = "auto",
        route: Literal["batch", "single"] = "batch",
        images_per_request: int = 8,
        concurrency: int = 4,
        timeout_s: float = 30.0,
        deadline_s: float = 120.0,
        breaker_after: int = 5,
        probe_s: float = 5.0,
        spill: bool = False,
        token_env: str = "REWARD_TOKEN",
    ) -> None:
        counts = {"images_per_request": images_per_request, "concurrency": concurrency, "breaker_after": breaker_after}
        times = {"timeout_s": timeout_s, "deadline_s": deadline_s, "probe_s": probe_s}
        for name, value in {**counts, **times}.items():
            if not value > 0:
                raise ConfigError(f"{name}={value} must be positive")
        if route not in ROUTES or mapping not in ("auto", "rank", "round_robin"):
            raise ConfigError(
                f"route={route!r}, mapping={mapping!r}: choose route from {sorted(ROUTES)}, mapping from auto, rank, round_robin"
            )
        self.given_urls = urls
        self.urls = parse_urls(urls_from_environment(1) if urls is None else urls)
        self.fields = dict(outputs) if isinstance(outputs, Mapping) else {name: name for name in outputs}
        if not self.fields:
            raise ConfigError("outputs is empty; name at least one score of the server, e.g. outputs: [ocr_similarity]")
        self.outputs = list(self.fields)
        self.mapping, self.route = mapping, route
        self.images_per_request = images_per_request if route == "batch" else 1
        self.concurrency, self.timeout_s, self.deadline_s = concurrency, timeout_s, deadline_s
        self.breaker_after, self.probe_s, self.spill, self.token_env = breaker_after, probe_s, spill, token_env
        self.last_error = self._last_failure = ""
        self._pool: _Pool | None = None
        self._counts = Counter(requests=0, retries=0, failures=0, breaker_opened=0)
        self.own = servers_of_rank(self.urls, rank=0, world_size=1, mapping="auto")

    # -- the trainer's side

    def check(self, rows: Iterable[Info]) -> None:
        if "ocr_similarity" in (self.fields[name] for name in (self.outputs if self.counted is None else self.counted)):
            check_targets(rows)

    def setup(self, *, rank: int, world_size: int, device: str) -> None:
        """Pick this rank's servers and wait until they are ready. Raises ConfigError naming one that does not, or lacks `outputs`."""
        if self.given_urls is None:
            self.urls = parse_urls(urls_from_environment(world_size))
        self.own = servers_of_rank(self.urls, rank=rank, world_size=world_size, mapping=self.mapping)
        if world_size > 1 and len(self.urls) not in (1, world_size):
            log.info("rank %d of %d asks %s of the %d reward servers", rank, world_size, self.own, len(self.urls))
        for url in self.own:
            health = check_health(url, headers=self._headers(), patience_s=self.deadline_s)
            check_outputs(url, list(self.fields.values()), health)
            told = health.get("highest")
            self.highest = {n: float(told[f]) for n, f in self.fields.items() if f in told} if isinstance(told, dict) else {}

    def score(self, media: Tensor, info: Sequence[Info]) -> Mapping[str, Tensor]:
        """As `score_async`, from code without a loop: connects, scores, disconnects."""

        async def once() -> Mapping[str, Tensor]:
            try:
                return await self.score_async(media, info)
            finally:
                await self.close()

        return asyncio.run(once())

    async def score_async(self, media: Tensor, info: Sequence[Info]) -> Mapping[str, Tensor]:
        """Scores Float64 "B" by output name, NaN where there is none. media: uint8 "B 3 H W"."""
        images = media.permute(0, 2, 3, 1).contiguous().numpy()
        size, pool = self.images_per_request, self._connect()
        for breaker in pool.breakers.values():
            breaker.hurry()
        pieces = [slice(i, i + size) for i in range(0, len(images), size)]
        answers = await asyncio.gather(*(self._score_piece(pool, images[p], info[p]) for p in pieces))
        rows = [row for answer in answers for row in answer]
        for row in rows:
            if row is not None and (missing := [f for f in self.fields.values() if f not in row]):
                raise RewardError(f"reward server {self.own} answers {sorted(row)}, not {missing}; set `outputs` to names it has")
        return {name: torch.tensor([math.nan if r is None else r[f] for r in rows], dtype=torch.float64) for name, f in self.fields.items()}

    def counters(self) -> Mapping[str, float]:
        """requests, retries, failures (images that lack a score), breaker_opened."""
        return dict(self._counts)

    async def close(self) -> None:
        """Close the session. The next call opens a new one."""
        if self._pool is not None:
            pool, self._pool = self._pool, None
            await pool.session.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pool": None}

    # -- on the scoring loop

    def _headers(self) -> dict[str, str]:
        token = token_from_environment(self.token_env)
        return {"Authorization": f"Bearer {token}"} if token else {}

    def _connect(self) -> _Pool:
        """One session per loop; a fork or a restarted loop gets its own."""
        loop = asyncio.get_running_loop()
        if self._pool is None or self._pool.loop is not loop or self._pool.pid != os.getpid():
            import aiohttp

            urls = self.own + ([u for u in self.urls if u not in self.own] if self.spill else [])
            connector = aiohttp.TCPConnector(limit=0, limit_per_host=self.concurrency + 1)  # one for the probe
            self._pool = _Pool(
                pid=os.getpid(),
                loop=loop,
                session=aiohttp.ClientSession(
                    connector=connector, headers=self._headers() | {"Accept-Encoding": "identity"}, auto_decompress=False
                ),
                gate=asyncio.Semaphore(self.concurrency * len(self.own)),
                breakers={url: Breaker(limit=self.breaker_after, probe_s=self.probe_s) for url in dict.fromkeys(urls)},
                own=self.own,
            )
        return self._pool

    async def _score_piece(self, pool: _Pool, images: np.ndarray, info: Sequence[Info]) -> list[Row]:
        """One request with all its retries. What stays without an answer is None."""
        async with pool.gate:
            request = await self._encode(images, info)
            until = time.monotonic() + self.deadline_s
            try:
                rows, reasons = await self._retrying(until)(self._send, pool, request, until)
            except _NoAnswer as error:
                rows, reasons = [None] * len(images), {0: str(error)}
        fields = self.fields.values()
        lost = [row for row in rows if row is None or any(math.isnan(row.get(f, 0.0)) for f in fields)]
        self._counts["failures"] += len(lost)
        if lost:
            self.last_error = next(iter(reasons.values()), f"reward server {pool.own}: null for an image among {list(fields)}")
        return rows

    def _retrying(self, until: float) -> Any:
        """Jittered exponential back-off on top of what the server asked for, until the next try would come after `until`."""
        from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

        backoff = wait_random_exponential(multiplier=0.1, max=5.0)

        def error_of(state: RetryCallState) -> _NoAnswer:
            assert state.outcome is not None
            error = state.outcome.exception()
            assert isinstance(error, _NoAnswer)
            return error

        def count(_: RetryCallState) -> None:
            self._counts["retries"] += 1

        return AsyncRetrying(
            retry=retry_if_exception_type(_NoAnswer),
            wait=lambda state: error_of(state).retry_after_s + backoff(state),
            stop=lambda state: state.attempt_number >= error_of(state).tries or time.monotonic() + state.upcoming_sleep >= until,
            before_sleep=count,
            reraise=True,
        )

    async def _send(self, pool: _Pool, request: _Request, until: float) -> tuple[list[Row], dict[int, str]]:
        """One try, and what the breaker learns from it. Raises _NoAnswer."""
        url = pool.pick()
        breaker = pool.breakers[url]
        try:
            await breaker.admit(lambda: _is_alive(pool.session, url), patience_s=self.deadline_s, until=until)
        except ServerDown as down:
            raise _NoAnswer(f"reward server {url} is {down}; last: {self._last_failure}", tries=0) from down
        self._counts["requests"] += 1
        alive = False
        try:
            answer = await self._post(pool.session, url, request, min(self.timeout_s, until - time.monotonic()))
            alive = True
            return answer
        except _NoAnswer as error:
            alive = error.alive
            self.last_error = self._last_failure = str(error)
            raise
        finally:
            was_closed = breaker.closed
            breaker.succeeded() if alive else breaker.failed()
            self._counts["breaker_opened"] += was_closed and not breaker.closed

    async def _post(self, session: aiohttp.ClientSession, url: str, request: _Request, seconds: float) -> tuple[list[Row], dict[int, str]]:
        """Send, and understand the answer. Raises _NoAnswer."""
        import aiohttp

        seconds = max(seconds, 0.001)
        limit = aiohttp.ClientTimeout(total=seconds, sock_connect=min(seconds, 5.0))
        headers = {**request.headers, "X-Deadline-Ms": str(min(math.ceil(seconds * 1000), 3_600_000))}
        body = io.BytesIO(request.body)  # bytes would be written in one go, blocking the loop
        try:
            async with session.post(url + ROUTES[self.route], data=body, headers=headers, timeout=limit, allow_redirects=False) as response:
                status, text = response.status, await read_answer(response, MAX_ANSWER + MAX_ROW * request.count)
                wait = retry_after(response.headers.get("Retry-After"))
        except TooMuch as error:
            raise _NoAnswer(f"reward server {url}: {error}", tries=3) from error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            why = f"no answer in timeout_s={seconds:.3g}" if isinstance(error, TimeoutError) else f"{type(error).__name__} {error}"
            raise _NoAnswer(f"reward server {url}: {why}") from error
        if status != 200:
            raise _refusal(url, self.route, status, text, wait)
        try:
            rows, reasons = decode_answer(request.unwrap(text), request.count)
        except WireError as error:
            raise _NoAnswer(f"reward server {url}: {error}", tries=3) from error
        return rows, {i: f"reward server {url}, image {i}: {reason}" for i, reason in reasons.items()}

    async def _encode(self, images: np.ndarray, info: Sequence[Info]) -> _Request:
        prompts = [str(row["prompt"]) for row in info]
        targets = [find_target(row) for row in info]
        masks = await asyncio.to_thread(_masks, images, info)
        if self.route == "single":
            extra = {"target": targets[0]} if targets[0] is not None else {}
            extra |= {"mask": await asyncio.to_thread(_png_base64, masks[0])} if masks is not None else {}
            png = await asyncio.to_thread(_png_base64, images[0])
            body = json.dumps({"image": png, "prompt": prompts[0], **extra}).encode()
            return _Request(body, {"Content-Type": "application/json"}, 1, _as_batch_answer)
        some_targets = targets if any(t is not None for t in targets) else None
        body = encode_batch(images, prompts, request_id=uuid.uuid4().hex, masks=masks, targets=some_targets)
        return _Request(body, {"Content-Type": CONTENT_TYPE, "X-Batch-Size": str(len(images))}, len(images), bytes)


class _NoAnswer(Exception):
    """A try that brought no scores. tries: give up after so many; retry_after_s: the server asked to wait; alive: it answered sensibly."""

    def __init__(self, message: str, *, tries: float = math.inf, retry_after_s: float = 0.0, alive: bool = False) -> None:
        super().__init__(message)
        self.tries, self.retry_after_s, self.alive = tries, retry_after_s, alive


@dataclass
class _Request:
    body: bytes
    headers: Mapping[str, str]
    count: int
    unwrap: Callable[[bytes], bytes]


@dataclass
class _Pool:
    """What belongs to one loop in one process."""

    pid: int
    loop: asyncio.AbstractEventLoop
    session: aiohttp.ClientSession
    gate: asyncio.Semaphore
    breakers: dict[str, Breaker]
    own: list[str]
    turn: int = 0

    def pick(self) -> str:
        """The next of the own servers that is up, else a spill server that is up, else the next own one."""
        first = self.turn % len(self.own)
        self.turn += 1
        turns = [*self.own[first:], *self.own[:first]]
        candidates = turns + [url for url in self.breakers if url not in self.own]
        return next((url for url in candidates if self.breakers[url].closed), turns[0])


def _refusal(url: str, route: str, status: int, body: bytes, wait: float) -> _NoAnswer:
    tries = math.inf if status in PASSING else 2 if status == 500 else 1
    said = "".join(letter if letter.isprintable() else " " for letter in body[:300].decode(errors="replace"))  # no codes for terminals
    message = f"reward server {url}: status {status} {said}"
    if status in (404, 405) and route == "batch":
        message += f"; one that has no {ROUTES[route]} but {ROUTES['single']} is asked with HTTPReward's route: single"
    return _NoAnswer(message, tries=tries, retry_after_s=wait, alive=status not in OUTAGE)


async def _is_alive(session: aiohttp.ClientSession, url: str) -> bool:
    """Ready, or too old to have `/health`."""
    import aiohttp

    try:
        async with session.get(f"{url}/health", timeout=aiohttp.ClientTimeout(total=5.0), allow_redirects=False) as response:
            return response.status in (200, 404, 405)
    except (aiohttp.ClientError, TimeoutError, OSError):
        return False


def _masks(images: np.ndarray, info: Sequence[Info]) -> np.ndarray | None:
    """The prompts' masks uint8 [N, H, W], all white for a prompt without one; None if no prompt has one. May read files."""
    height, width = images.shape[1:3]
    masks = [mask_of(row, height, width) for row in info]
    if all(mask is None for mask in masks):
        return None
    return np.stack([np.full((height, width), 255, np.uint8) if mask is None else mask for mask in masks])


def _png_base64(image: np.ndarray) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=1)  # level 6 costs three times the CPU for 9 % fewer bytes
    return base64.b64encode(buffer.getvalue()).decode()


def _as_batch_answer(body: bytes) -> bytes:
    """`/score` answers one object: the batched answer with one entry."""
    return b'{"errors": {}, "scores": [' + body + b"]}"
