"""Rewards from servers over HTTP: the servers of a rank, retries, and samples that got no score."""

from __future__ import annotations

import asyncio
import io
import logging
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from lit_rl.errors import ConfigError
from lit_rl.net.addresses import check_health, check_outputs, parse_urls, servers_of_rank, urls_from_environment
from lit_rl.net.pool import Pool
from lit_rl.net.retry import UNREADABLE_TRIES, NoAnswer, Patience, bearer, exchange, refusal, retried
from lit_rl.rewards.base import Reward, RewardError
from lit_rl.rewards.quotes import check_targets
from lit_rl.rewards.requests import ROUTES, ScoreRequest, images_request, texts_request
from lit_rl.rewards.service.wire import WireError, decode_answer
from lit_rl.types import Info

log = logging.getLogger(__name__)

Media = Tensor | Sequence[str]

Row = dict[str, float] | None
"""Scores of one sample by the server's names; None: the server could not score it."""

MAX_ANSWER = 1 << 20
"""Bytes of an answer beside `MAX_ROW` for each sample; a server that says more is not believed."""
MAX_ROW = 1 << 16
MAX_WAIT = 5.0
"""Seconds of the longest back-off."""


class HTTPReward(Reward):
    """Scores from reward servers: `POST /v1/score_batch`, or `POST /score` (route: single) with one sample per request.

    Images go as raw uint8 (single: as PNG) with their prompts, and the wanted text (`quotes.find_target`) and `mask` where there are any;
    texts go as JSON with the rows that they answer. docs/rewards.md has the protocol.

    Retried until the deadline: connection errors, timeouts, 408, 429 (waiting as Retry-After says), 502-504. A body that is no answer
    is retried twice, 500 once, other statuses never. What remains without a score is NaN, counted in `counters()`, and explained in
    `last_error`.

    Args:
        urls: `http://host:port`, bare `host:port`, or a range of ports `host:8000-8003`, several in a list or after commas. Default: what
            the environment says: $REWARD_SERVER_URLS, else one port per process from $REWARD_SERVER_HOST:$REWARD_SERVER_PORT on
            (127.0.0.1:8000).
        outputs: Names of the scores to use, or {name here: name at the server}. The first counts where the run gives no weights.
        mapping: Which servers a process asks. `rank`: process i server i, fewer servers are shared evenly; `round_robin`: all of them,
            starting at its own; `auto`: as `rank`, and with more servers than processes every n-th.
        route: `batch` sends several samples at once to /v1/score_batch, `single` one per request to /score.
        samples_per_request: Images or texts in one request of route batch.
        concurrency: Requests in flight per server.
        timeout_s: Seconds of the first try; they double after each one that took too long.
        deadline_s: Seconds of one request with all its retries, counted from its first try or, if earlier, from when its server was given
            up as down.
        breaker_after: After so many failures in a row a server is asked only for /health until it answers.
        probe_s: Seconds between two such questions.
        spill: A process whose servers are down asks the others'.
        token_env: Environment variable with a bearer token; unset = none.
    """

    medium = None
    remedy = "look at the reward server's log; raise HTTPReward's deadline_s or timeout_s if it is slow"

    def __init__(
        self,
        urls: str | list[str] | None = None,
        outputs: Sequence[str] | Mapping[str, str] = ("ocr_similarity",),
        mapping: Literal["auto", "rank", "round_robin"] = "auto",
        route: Literal["batch", "single"] = "batch",
        samples_per_request: int = 8,
        concurrency: int = 4,
        timeout_s: float = 30.0,
        deadline_s: float = 300.0,
        breaker_after: int = 5,
        probe_s: float = 5.0,
        spill: bool = False,
        token_env: str = "REWARD_TOKEN",
    ) -> None:
        counts = {"samples_per_request": samples_per_request, "concurrency": concurrency, "breaker_after": breaker_after}
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
        self.samples_per_request = samples_per_request if route == "batch" else 1
        self.concurrency, self.timeout_s, self.deadline_s = concurrency, timeout_s, deadline_s
        self.breaker_after, self.probe_s, self.spill, self.token_env = breaker_after, probe_s, spill, token_env
        self.last_error = ""
        self._pool: Pool | None = None
        self._counts = Counter(requests=0, retries=0, failures=0, breaker_opened=0)
        self.own = servers_of_rank(self.urls, rank=0, world_size=1, mapping="auto")

    # -- the trainer's side

    def check(self, rows: Iterable[Info]) -> None:
        """Raises ConfigError for prompts without a wanted text, where a score of OCR counts."""
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
            if (media := health.get("media")) in (["images"], ["texts"]):
                self.medium = media[0]

    def score(self, media: Media, info: Sequence[Info]) -> Mapping[str, Tensor]:
        """As `score_async`, from code without a loop: connects, scores, disconnects."""

        async def once() -> Mapping[str, Tensor]:
            try:
                return await self.score_async(media, info)
            finally:
                await self.close()

        return asyncio.run(once())

    async def score_async(self, media: Media, info: Sequence[Info]) -> Mapping[str, Tensor]:
        """Scores Float64 "B" by output name, NaN where there is none. media: uint8 "B 3 H W", or B texts."""
        size, pool = self.samples_per_request, self._connect()
        pool.hurry()
        pieces = [slice(i, i + size) for i in range(0, len(info), size)]
        encodes: list[Callable[[], Awaitable[ScoreRequest]]]
        if isinstance(media, Tensor):
            images = media.permute(0, 2, 3, 1).contiguous().numpy()
            encodes = [partial(images_request, images[p], info[p], route=self.route) for p in pieces]
        else:
            encodes = [partial(texts_request, media[p], info[p], route=self.route) for p in pieces]
        answers = await asyncio.gather(*(self._score_piece(pool, encode, len(info[p])) for encode, p in zip(encodes, pieces, strict=True)))
        rows = [row for answer in answers for row in answer]
        for row in rows:
            if row is not None and (missing := [f for f in self.fields.values() if f not in row]):
                raise RewardError(f"reward server {self.own} answers {sorted(row)}, not {missing}; set `outputs` to names it has")
        return {name: torch.tensor([math.nan if r is None else r[f] for r in rows], dtype=torch.float64) for name, f in self.fields.items()}

    def counters(self) -> Mapping[str, float]:
        """requests, retries, failures (samples that lack a score), breaker_opened."""
        return dict(self._counts)

    async def close(self) -> None:
        """Close the session. The next call opens a new one."""
        if self._pool is not None:
            pool, self._pool = self._pool, None
            await pool.session.close()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_pool": None}

    # -- on the scoring loop

    def _headers(self) -> dict[str, str]:
        return bearer(self.token_env)

    def _connect(self) -> Pool:
        """One pool per loop; a fork or a restarted loop gets its own."""
        if self._pool is None or not self._pool.is_here:
            spill = [url for url in self.urls if url not in self.own] if self.spill else []
            self._pool = Pool(
                self.own,
                spill,
                concurrency=self.concurrency,
                token_env=self.token_env,
                breaker_after=self.breaker_after,
                probe_s=self.probe_s,
                counts=self._counts,
                kind="reward server",
            )
        return self._pool

    async def _score_piece(self, pool: Pool, encode: Callable[[], Awaitable[ScoreRequest]], count: int) -> list[Row]:
        """One request with all its retries. What stays without an answer is None."""
        async with pool.gate:
            request = await encode()
            patience = Patience(self.timeout_s, time.monotonic() + self.deadline_s)
            try:
                rows, reasons = await retried(partial(self._try, pool, request, patience), until=patience.until, max_wait_s=MAX_WAIT)
            except NoAnswer as error:
                rows, reasons = [None] * count, {0: str(error)}
        fields = self.fields.values()
        lost = [row for row in rows if row is None or any(math.isnan(row.get(f, 0.0)) for f in fields)]
        self._counts["failures"] += len(lost)
        if lost:
            self.last_error = next(iter(reasons.values()), f"reward server {pool.own}: null for a sample among {list(fields)}")
        return rows

    async def _try(self, pool: Pool, request: ScoreRequest, patience: Patience, number: int) -> tuple[list[Row], dict[int, str]]:
        """One try. Raises NoAnswer."""
        self._counts["retries"] += number > 1

        async def send(url: str) -> tuple[list[Row], dict[int, str]]:
            with patience.try_once() as seconds:
                return await self._post(pool, url, request, seconds)

        return await pool.ask(send, patience_s=self.deadline_s, until=patience.until)

    async def _post(self, pool: Pool, url: str, request: ScoreRequest, seconds: float) -> tuple[list[Row], dict[int, str]]:
        """Send, and understand the answer. Raises NoAnswer."""
        name = f"reward server {url}"
        headers = {**request.headers, "X-Deadline-Ms": str(min(math.ceil(seconds * 1000), 3_600_000))}
        body = io.BytesIO(request.body)  # bytes would be written in one go, blocking the loop
        limit = MAX_ANSWER + MAX_ROW * request.count
        status, text, wait = await exchange(
            pool.session, url + request.route, name=name, seconds=seconds, limit=limit, body=body, headers=headers
        )
        if status != 200:
            raise refusal(f"{name}: status {status} {_said(text)}{_advice(status, request.route)}", status=status, wait=wait)
        try:
            rows, reasons = decode_answer(request.unwrap(text), request.count)
        except WireError as error:
            raise NoAnswer(f"{name}: {error}", tries=UNREADABLE_TRIES) from error
        return rows, {i: f"{name}, {request.what} {i}: {reason}" for i, reason in reasons.items()}


def _said(body: bytes) -> str:
    """The beginning of an answer, without codes for terminals."""
    return "".join(letter if letter.isprintable() else " " for letter in body[:300].decode(errors="replace"))


def _advice(status: int, route: str) -> str:
    if status in (404, 405) and route == ROUTES["batch"]:
        return f"; one that has no {ROUTES['batch']} but {ROUTES['single']} is asked with HTTPReward's route: single"
    return ""
