"""Keeping requests away from a server that is down, and noticing when it is back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable


class ServerDown(Exception):
    """The breaker stayed open until the caller's time was up."""


class Breaker:
    """closed -> `limit` failures in a row -> open -> a probe every `probe_s` says alive -> one request on trial -> closed, or open again.

    Lives on one asyncio loop. Callers bracket each request by `admit` and exactly one of `succeeded` and `failed`.
    """

    def __init__(self, *, limit: int, probe_s: float) -> None:
        self.limit, self.probe_s = limit, probe_s
        self.open_since: float | None = None
        self._failures = 0
        self._next_probe = 0.0
        self._on_trial = False
        self._moved = asyncio.Event()

    @property
    def closed(self) -> bool:
        """True while requests go out."""
        return self.open_since is None

    async def admit(self, probe: Callable[[], Awaitable[bool]], *, patience_s: float, until: float) -> None:
        """Return when a request may go out: at once if closed, else after the breaker closed or when this request is the trial.

        Raises ServerDown at `until` (`time.monotonic`) or when the breaker has been open for `patience_s`, but not before the
        probe that is due, or the trial under way, has had its say.
        """
        while self.open_since is not None:
            now = time.monotonic()
            end = until if self._on_trial else min(until, self.open_since + patience_s)
            if not self._on_trial and now >= self._next_probe:
                self._on_trial = True
                if await self._alive(probe):
                    return
                self.failed()
            elif now >= end:
                raise ServerDown(f"down for {now - self.open_since:.1f} s")
            else:
                await self._wait_for_move((end if self._on_trial else min(end, self._next_probe)) - now)

    def hurry(self) -> None:
        """Make the next probe due now: new work has come, and the server may be back."""
        self._next_probe = 0.0

    def succeeded(self) -> None:
        """The server answered."""
        self._failures, self._on_trial, self.open_since = 0, False, None
        self._wake()

    def failed(self) -> None:
        """The server did not answer, or not sensibly."""
        now = time.monotonic()
        self._failures += 1
        self._on_trial = False
        if self._failures >= self.limit and self.open_since is None:
            self.open_since = now
        self._next_probe = now + self.probe_s
        self._wake()

    async def _alive(self, probe: Callable[[], Awaitable[bool]]) -> bool:
        try:
            return await probe()
        except asyncio.CancelledError:
            self.failed()
            raise

    async def _wait_for_move(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._moved.wait(), seconds)
        except TimeoutError:
            return

    def _wake(self) -> None:
        self._moved.set()
        self._moved = asyncio.Event()
