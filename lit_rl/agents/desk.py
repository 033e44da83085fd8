"""Single requests of many coroutines, answered by an engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Protocol, TypeVar

from lit_rl.rollouts.base import Request, RolloutEngine, Sample, Sampling

T = TypeVar("T")
Asked = tuple[Request, asyncio.AbstractEventLoop, asyncio.Future[Sample]]


class Desk(Protocol):
    """Answers the requests of episodes."""

    async def answer(self, request: Request) -> Sample: ...


class OfCopy:
    """Engines with a copy of the weights take each request as it comes.

    Args:
        most: Requests under way at once.
    """

    def __init__(self, engine: RolloutEngine, sampling: Sampling, most: int) -> None:
        self.engine, self.sampling, self._gate = engine, sampling, asyncio.Semaphore(most)

    async def answer(self, request: Request) -> Sample:
        """The answer of the engine. Raises RolloutError where none comes."""
        async with self._gate:
            return await self.engine.answer(request, self.sampling)


class InProcess:
    """Engines over the training weights answer what is asked for together, in the thread that calls `serve`.

    An answer depends on its request alone, but its log-probabilities in the last bits on those beside it: a batch is what all episodes
    ask for, in the order of their keys, so that a continued run has the same ones. An episode whose world is slow is waited for only
    so long.

    Args:
        patience_s: Seconds that a first request waits for the others.
    """

    def __init__(self, engine: RolloutEngine, sampling: Sampling, patience_s: float) -> None:
        self.engine, self.sampling, self.patience_s = engine, sampling, patience_s
        self._asked: SimpleQueue[Asked | None] = SimpleQueue()

    async def answer(self, request: Request) -> Sample:
        """The answer of the next batch. Raises what the engine raises."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Sample] = loop.create_future()
        self._asked.put((request, loop, future))
        return await future

    def serve(self, work: Future[T], active: Callable[[], int]) -> None:
        """Answer until `work` is done. active: how many episodes are under way, each of which asks once at a time."""
        work.add_done_callback(lambda _: self._asked.put(None))
        while (batch := self._batch(active)) is not None:
            waiting = [asked for asked in batch if not asked[2].cancelled()]
            waiting.sort(key=lambda asked: tuple(map(str, asked[0].key)))
            if not waiting:
                continue
            samples = self.engine.generate([request for request, _, _ in waiting], self.sampling)
            for (_, loop, future), sample in zip(waiting, samples, strict=True):
                loop.call_soon_threadsafe(_tell, future, sample)

    def _batch(self, active: Callable[[], int]) -> list[Asked] | None:
        """Requests that are answered together; None once there is nobody left to ask."""
        batch: list[Asked] = []
        until = float("inf")
        while not batch or (len(batch) < active() and time.monotonic() < until):
            try:
                asked = self._asked.get(timeout=None if not batch else min(0.02, self.patience_s))
            except Empty:
                continue
            if asked is None:
                return None
            if not batch:
                until = time.monotonic() + self.patience_s
            batch.append(asked)
        return batch


def _tell(future: asyncio.Future[Sample], sample: Sample) -> None:
    if not future.done():
        future.set_result(sample)
