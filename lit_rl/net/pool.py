"""Servers that may stand in for each other: a session, a gate, and a breaker for each of them."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from lit_rl.net.breaker import Breaker, ServerDown
from lit_rl.net.retry import NoAnswer, health, open_session

T = TypeVar("T")


class Pool:
    """Belongs to one loop of one process (`is_here`). Made on that loop.

    Args:
        own: Servers to ask, in turn.
        spill: Servers to ask while none of `own` is up.
        concurrency: Requests in flight per server of `own`.
        counts: Receives `requests` and `breaker_opened`.
        kind: Of server, for messages.
    """

    def __init__(
        self,
        own: Sequence[str],
        spill: Sequence[str],
        *,
        concurrency: int,
        token_env: str,
        breaker_after: int,
        probe_s: float,
        counts: Counter[str],
        kind: str,
    ) -> None:
        import aiohttp

        self.pid, self.loop, self.counts, self.kind = os.getpid(), asyncio.get_running_loop(), counts, kind
        connector = aiohttp.TCPConnector(limit=0, limit_per_host=concurrency + 1)  # one for the probe
        self.session = open_session(token_env=token_env, connector=connector)
        self.gate = asyncio.Semaphore(concurrency * len(own))
        self.own, self.turn = list(own), 0
        self.breakers = {url: Breaker(limit=breaker_after, probe_s=probe_s) for url in dict.fromkeys([*own, *spill])}
        self.last_failure = ""

    @property
    def is_here(self) -> bool:
        """False in a fork, and on another loop."""
        return self.loop is asyncio.get_running_loop() and self.pid == os.getpid()

    def hurry(self) -> None:
        """Have servers that are down looked at now: new work has come."""
        for breaker in self.breakers.values():
            breaker.hurry()

    async def ask(self, send: Callable[[str], Awaitable[T]], *, patience_s: float, until: float) -> T:
        """`send(url)` of a server that is up, and the breaker learns from it. Raises NoAnswer, also when none comes up in time.

        patience_s: A server may be down for so long before its requests are given up; until: as `Breaker.admit`.
        """
        url = self._pick()
        breaker = self.breakers[url]
        try:
            await breaker.admit(lambda: self._is_alive(url), patience_s=patience_s, until=until)
        except ServerDown as down:
            raise NoAnswer(f"{self.kind} {url} is {down}; last: {self.last_failure}", tries=0) from down
        self.counts["requests"] += 1
        alive = False
        try:
            answer = await send(url)
            alive = True
            return answer
        except NoAnswer as error:
            alive = error.alive
            self.last_failure = str(error)
            raise
        finally:
            was_closed = breaker.closed
            breaker.succeeded() if alive else breaker.failed()
            self.counts["breaker_opened"] += was_closed and not breaker.closed

    def _pick(self) -> str:
        """The next of the own servers that is up, else a spill server that is up, else the next own one."""
        first = self.turn % len(self.own)
        self.turn += 1
        turns = [*self.own[first:], *self.own[:first]]
        candidates = turns + [url for url in self.breakers if url not in self.own]
        return next((url for url in candidates if self.breakers[url].closed), turns[0])

    async def _is_alive(self, url: str) -> bool:
        """Ready, or too old to have `/health`."""
        return await health(self.session, url) in (200, 404, 405)
