"""An asyncio loop in a daemon thread, on which rewards are computed beside the rollout."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections import defaultdict
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Protocol, TypeVar

from torch import Tensor

from lit_rl.rewards.base import Reward
from lit_rl.types import Info

log = logging.getLogger(__name__)
T = TypeVar("T")


class Closing(Protocol):
    """Something with sessions or threads on the loop, which end with it."""

    async def close(self) -> None: ...


class Background:
    """Belongs to the process that made it (`pid`): threads do not survive a fork."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._loop = asyncio.new_event_loop()
        self._workers = ThreadPoolExecutor(thread_name_prefix="reward-worker")
        self._loop.set_default_executor(self._workers)
        self._one_at_a_time: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._thread = threading.Thread(target=self._loop.run_forever, name="reward-scoring", daemon=True)
        self._thread.start()

    def start(self, label: str, reward: Reward, media: object, info: Sequence[Info]) -> Future[Mapping[str, Tensor]]:
        """Score one chunk; returns at once. Rewards that compute in this process see one chunk at a time."""
        return asyncio.run_coroutine_threadsafe(self._score(label, reward, media, info), self._loop)

    def run(self, work: Coroutine[object, object, T]) -> Future[T]:
        """Begin anything else on the loop; returns at once."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self, rewards: Iterable[Closing], *, patience_s: float = 5.0) -> None:
        """Cancel what is under way, close the rewards, end the threads. What computes in this process finishes unheard.

        Each of the three is waited for `patience_s` at most.
        """
        try:
            asyncio.run_coroutine_threadsafe(self._finish(rewards), self._loop).result(patience_s)
        except TimeoutError:
            log.warning("rewards did not close in %g s; their connections are dropped", patience_s)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(patience_s)
        ending = threading.Thread(target=partial(self._workers.shutdown, cancel_futures=True), daemon=True)
        ending.start()
        ending.join(patience_s)
        if not self._loop.is_running():
            self._loop.close()

    async def _score(self, label: str, reward: Reward, media: object, info: Sequence[Info]) -> Mapping[str, Tensor]:
        if type(reward).score_async is not Reward.score_async:
            return await reward.score_async(media, info)
        async with self._one_at_a_time[label]:
            return await reward.score_async(media, info)

    async def _finish(self, rewards: Iterable[Closing]) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for reward in rewards:
            try:
                await reward.close()
            except Exception:
                log.warning("closing %s failed", type(reward).__name__, exc_info=True)
