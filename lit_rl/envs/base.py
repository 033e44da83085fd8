"""The protocol of worlds: what an agent's rollout asks of them, how long each call may take, and whose fault it is when it fails."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from PIL import Image

from lit_rl.envs.actions import Action, ActionError, Kind
from lit_rl.envs.failures import Limits, Status, WorldError, limited
from lit_rl.envs.tasks import Task

log = logging.getLogger(__name__)
T = TypeVar("T")
Call = Literal["reset", "screenshot", "execute", "evaluate", "close"]


@dataclass(frozen=True)
class Observation:
    """One look at a world.

    image: RGB picture of the screen, or None in a world of texts. text: What the world says beside it. ended: The world takes no more
    actions. state: Name of the state, the same wherever a task looks the same; empty: the world has none of its own, see `key`.
    """

    image: Image.Image | None = None
    text: str = ""
    ended: bool = False
    state: str = ""

    @property
    def key(self) -> str:
        """`state`, or a hash of the pixels and the text: equal for looks that are the same."""
        if self.state:
            return self.state
        picture = (str(self.image.size).encode() + self.image.tobytes()) if self.image else b""
        return hashlib.sha256(picture + self.text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Outcome:
    """The worth of an episode. success: The task is done. reward: By default 1 for success, 0 for failure. details: Facts for records."""

    success: bool
    reward: float
    details: Mapping[str, object] = field(default_factory=dict)

    @property
    def status(self) -> Status:
        """`SUCCESS` or `FAILURE`."""
        return Status.SUCCESS if self.success else Status.FAILURE


class World(ABC):
    """One world for one episode: reset once, then screenshots and actions in turns, one evaluation, one close.

    A kind of world fills in the `on_...` methods; callers use the others, which hold each call to `limits` and sort failures:
    `ActionError` is the policy's (it is told, and the episode goes on), `WorldError` the world's (the episode is worth nothing).
    Calls to one world come one after the other.

    kinds: Actions that this world takes, beside `done` and `fail`, which end an episode in every world. grounds: It takes an action's
    `target` where points are missing, and finds them itself.
    """

    kinds: frozenset[Kind] = frozenset()
    grounds: bool = False

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.answer: str | None = None
        """The text of `done`, once the policy has said it."""
        self.ended = False
        self._seen: tuple[int, int] | None = None
        self._closed = False

    async def reset(self, task: Task, seed: int) -> str:
        """Bring the world to the start of a task and return the instruction. The same task and seed give the same start."""
        try:
            return await self._limited("reset", self.on_reset(task, seed))
        except WorldError as error:
            raise WorldError(str(error), Status.RESET_FAILED) from error

    async def screenshot(self) -> Observation:
        """Look at the world."""
        seen = await self._limited("screenshot", self.on_screenshot())
        self._seen = seen.image.size if seen.image else None
        self.ended |= seen.ended
        return seen if seen.ended or not self.ended else Observation(seen.image, seen.text, True, seen.state)

    async def execute(self, action: Action) -> None:
        """Carry out an action. Points are pixels of the last screenshot. Raises ActionError for what this world cannot do."""
        if self.ended:
            raise ActionError("the episode has ended; no further action is taken")
        if action.kind in ("done", "fail"):
            self.answer, self.ended = (action.text if action.kind == "done" else None), True
        elif action.kind not in self.kinds:
            raise ActionError(f"{action.kind} is not an action here; there are {', '.join(sorted(self.kinds | {'done', 'fail'}))}")
        elif action.target and not action.points and not self.grounds:
            raise ActionError(f"nobody here finds {action.target!r}; {action.kind} needs a point, x and y")
        elif self._seen and (point := action.outside(self._seen)):
            width, height = self._seen
            raise ActionError(f"({point[0]:g}, {point[1]:g}) is outside of the screen of {width} x {height} pixels")
        more = action.seconds if action.kind == "wait" else 0.0
        await self._limited("execute", self.on_execute(action), more)

    async def evaluate(self) -> Outcome:
        """Find out whether the task is done, from the state of the world alone; what the policy claims is only `answer`."""
        return await self._limited("evaluate", self.on_evaluate())

    async def close(self) -> bool:
        """Give everything back; False where that failed, which is logged. A second call does nothing."""
        if self._closed:
            return True
        self._closed = True
        try:
            await self._limited("close", self.on_close())
        except WorldError as error:
            log.warning("%s", error)
            return False
        return True

    @abstractmethod
    async def on_reset(self, task: Task, seed: int) -> str:
        """Bring the world to the start of a task and return the instruction."""

    @abstractmethod
    async def on_screenshot(self) -> Observation:
        """Look, and say whether the world takes no more actions."""

    @abstractmethod
    async def on_execute(self, action: Action) -> None:
        """Carry out an action of `kinds`, or take note of `done` and `fail`, after which `ended` is set."""

    @abstractmethod
    async def on_evaluate(self) -> Outcome:
        """Judge the state of the world."""

    async def on_close(self) -> None:  # noqa: B027 - most worlds hold nothing
        """Give back what the world holds."""

    async def _limited(self, call: Call, work: Coroutine[None, None, T], more: float = 0.0) -> T:
        return await limited(work, getattr(self.limits, call) + more, f"{type(self).__name__}: {call}", f"limits.{call}")


class Worlds(ABC):
    """A supply of worlds of one kind, which a YAML names. Everything between `start` and `stop` happens in one event loop.

    Args:
        limits: Seconds that each call to a world may take.
    """

    kinds: frozenset[Kind] = frozenset()
    """Actions that these worlds take, beside `done` and `fail`."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.counts = {"opened": 0, "closed": 0, "leaked": 0}
        """Worlds that were opened, were closed, and could not be closed."""

    @abstractmethod
    def check(self, task: Task) -> None:
        """Raises ConfigError, beginning with the key, for a task that these worlds cannot set or evaluate; nothing is started for it."""

    async def start(self) -> None:  # noqa: B027 - most kinds need nothing
        """Start what the worlds share, and sweep up what an earlier run left. Raises ConfigError for what is not installed or not there."""

    async def stop(self) -> None:  # noqa: B027
        """End what `start` started. A second call does nothing."""

    @abstractmethod
    async def on_open(self) -> World:
        """Open a world; nothing of it may be left where this is cancelled or fails."""

    async def __aenter__(self) -> Worlds:
        try:
            await self.start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(self, *failure: object) -> None:
        await self.stop()

    @asynccontextmanager
    async def world(self) -> AsyncIterator[World]:
        """A fresh world, which is closed at the end of the block, however that ends. Raises WorldError where none can be had."""
        try:
            name = f"{type(self).__name__}: opening a world"
            world = await limited(self.on_open(), self.limits.reset, name, "limits.reset")
        except WorldError as error:
            raise WorldError(str(error), Status.RESET_FAILED) from error
        self.counts["opened"] += 1
        try:
            yield world
        finally:
            await asyncio.shield(asyncio.ensure_future(self._give_back(world)))  # a cancelled episode gives its world back, too

    async def attempts(self, episode: Callable[[World, int], Awaitable[T]], retries: int = 2) -> T:
        """The result of `episode(world, attempt)`; after a WorldError again in a fresh world, up to `retries` times."""
        for attempt in range(retries + 1):
            try:
                async with self.world() as world:
                    return await episode(world, attempt)
            except WorldError as error:
                if attempt == retries:
                    raise
                log.warning("attempt %d of %d: %s; trying again in a fresh world", attempt + 1, retries + 1, str(error))
        raise AssertionError("the last attempt returns or raises")

    async def _give_back(self, world: World) -> None:
        self.counts["closed" if await world.close() else "leaked"] += 1
