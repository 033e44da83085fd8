"""Many episodes at once: worlds in a thread of their own, answers from the engine, and failures that are nobody's sorted out."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TypeVar, final

from lit_rl.agents.codecs import Codec, Compact
from lit_rl.agents.desk import Desk, InProcess, OfCopy
from lit_rl.agents.episodes import Episode, Manner, Trajectory
from lit_rl.envs.base import World, Worlds
from lit_rl.envs.failures import Status, WorldError
from lit_rl.envs.tasks import Task
from lit_rl.envs.tiny_desktop import TinyDesktops
from lit_rl.errors import ConfigError
from lit_rl.policies.base import TokenPolicy
from lit_rl.rollouts.base import RolloutEngine, RolloutError, Sampling
from lit_rl.seeding import Key, seed_of

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """An episode that is wanted.

    world_seed: The same for all siblings; the task's own if it has one. key: All that the randomness of its answers depends on.
    temperature: Temperature of its answers; None = the sampling's.
    """

    task: Task
    group: int
    number: int
    world_seed: int
    key: tuple[Key, ...]
    temperature: float | None = None


@final
class Episodes:
    """Settings of all episodes of a run: worlds, dialect, numbers of episodes at once and of trials.

    Args:
        worlds: Worlds in which tasks are done; default: desktops drawn in this process.
        codec: Dialect in which actions are written; default: words.
        manner: Settings of one episode.
        concurrency: Episodes, each in a world of its own, under way at once on each process.
        requests: Answers under way at once on each process, for engines with a copy of the weights.
        world_retries: Times that an episode whose world failed is begun again in a fresh one.
        min_valid_fraction: Share of an iteration's episodes on a process that must not be lost to failures of worlds and servers.
        patience_s: Seconds that an answer of an engine over the training weights waits for those of other episodes, to be drawn together.
    """

    stored_with = ("manner",)

    def __init__(
        self,
        *,
        worlds: Worlds | None = None,
        codec: Codec | None = None,
        manner: Manner | None = None,
        concurrency: int = 64,
        requests: int = 64,
        world_retries: int = 2,
        min_valid_fraction: float = 0.5,
        patience_s: float = 2.0,
    ) -> None:
        for name, value in {"concurrency": concurrency, "requests": requests}.items():
            if value < 1:
                raise ConfigError(f"model.episodes.{name}={value} must be at least 1")
        if not 0 <= min_valid_fraction <= 1:
            raise ConfigError(f"model.episodes.min_valid_fraction={min_valid_fraction} must be in [0, 1]")
        self.worlds, self.codec, self.manner = worlds or TinyDesktops(), codec or Compact(), manner or Manner()
        self.concurrency, self.requests, self.world_retries = concurrency, requests, world_retries
        self.min_valid_fraction, self.patience_s = min_valid_fraction, patience_s
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._playing: asyncio.Task[list[Trajectory]] | None = None
        self._active = 0

    # ------------------------------------------------------------------ life
    def start(self) -> None:
        """Start what the worlds share, in a thread with an event loop. Raises ConfigError for what is not there."""
        if self._loop is not None:
            return
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True, name="worlds")
        self._thread.start()
        try:
            self._in_loop(self.worlds.start()).result()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End everything that was started, once episodes that were cancelled have given their worlds back. A second call does nothing."""
        if self._loop is None or self._thread is None:
            return
        loop, thread, self._loop = self._loop, self._thread, None
        try:
            asyncio.run_coroutine_threadsafe(self._stop(), loop).result()
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()

    async def _stop(self) -> None:
        if self._playing is not None:
            await asyncio.wait([self._playing])
        await self.worlds.stop()

    def _in_loop(self, work: Coroutine[None, None, T]) -> Future[T]:
        assert self._loop is not None, "start comes first"
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    # ------------------------------------------------------------------ episodes
    def play(self, policy: TokenPolicy, engine: RolloutEngine, sampling: Sampling, jobs: Sequence[Job]) -> list[Trajectory]:
        """The trajectories of the jobs, in their order. Raises RolloutError where too many were lost.

        An error of this process, such as of the engine's, ends all episodes and is raised.
        """
        desk: Desk = OfCopy(engine, sampling, self.requests) if engine.has_copy else InProcess(engine, sampling, self.patience_s)
        found = self.play_with(Episode, policy, desk, jobs)
        self._check(found)
        return found

    def play_with(self, kind: type[Episode], policy: TokenPolicy, desk: Desk, jobs: Sequence[Job]) -> list[Trajectory]:
        """The trajectories of episodes of this kind, whose requests this desk answers; nobody looks whether many were lost."""
        self.start()
        work = self._in_loop(self._all(kind, policy, desk, jobs))
        try:
            if isinstance(desk, InProcess):
                desk.serve(work, lambda: self._active)
            return work.result()
        except BaseException:
            work.cancel()
            raise

    async def _all(self, kind: type[Episode], policy: TokenPolicy, desk: Desk, jobs: Sequence[Job]) -> list[Trajectory]:
        places = asyncio.Semaphore(self.concurrency)
        self._playing, self._active = asyncio.current_task(), 0

        async def one(job: Job) -> Trajectory:
            async with places:
                self._active += 1
                try:
                    return await self._episode(kind, policy, desk, job)
                finally:
                    self._active -= 1

        try:
            async with asyncio.TaskGroup() as everything:
                tasks = [everything.create_task(one(job)) for job in jobs]
        except ExceptionGroup as errors:  # the first one cancelled the others
            raise errors.exceptions[0] from None
        finally:
            self._playing = None
        return [task.result() for task in tasks]

    async def _episode(self, kind: type[Episode], policy: TokenPolicy, desk: Desk, job: Job) -> Trajectory:
        """The trajectory of a job; one that was lost in each of its worlds has the status of its last failure."""
        start = partial(Trajectory, job.task, job.group, job.number, job.world_seed, temperature=job.temperature)
        latest = start()

        async def attempt(world: World, number: int) -> Trajectory:
            nonlocal latest
            latest = start(attempt=number)
            return await kind(policy, self.codec, self.manner, desk, key=job.key).play(world, latest)

        try:
            return await self.worlds.attempts(attempt, self.world_retries)
        except WorldError as error:
            latest.status, latest.why = error.status, str(error)
        except (RolloutError, TimeoutError) as error:
            latest.status, latest.why = Status.SERVER_ERROR, f"{type(error).__name__}: {error}"
        log.warning("an episode of task %s is lost: %s", job.task.id, latest.why)
        return latest

    def _check(self, found: Sequence[Trajectory]) -> None:
        lost = [trajectory for trajectory in found if not trajectory.status.counts]
        if len(found) - len(lost) < self.min_valid_fraction * len(found):
            counts = ", ".join(f"{count} by {status}" for status, count in Counter(t.status for t in lost).items())
            raise RolloutError(
                f"{len(lost)} of {len(found)} episodes were lost ({counts}), more than model.episodes.min_valid_fraction="
                f"{self.min_valid_fraction:g} allows; the last one to {lost[-1].why}. Continue with --ckpt_path last once that is mended"
            )


def jobs_of(tasks: Sequence[tuple[Task, int, int]], *, seed: int, place: tuple[Key, ...]) -> list[Job]:
    """Jobs of (task, group, number among its siblings). The world's seed is the same within a group, that of the answers is not."""
    worlds = [seed_of(seed, "world", *place, g) % 2**31 if task.seed is None else task.seed for task, g, _ in tasks]
    return [Job(task, g, n, world, (seed, "episode", *place, g, n)) for (task, g, n), world in zip(tasks, worlds, strict=True)]
