"""Environments of gymnasium with `render` as worlds, each in a process of its own, which is killed when it hangs."""

from __future__ import annotations

import asyncio
import os
import pickle
import socket
import sys
from collections.abc import Mapping
from typing import Literal

from numpy import ndarray
from PIL import Image

from lit_rl.envs.actions import Action, ActionError, Kind
from lit_rl.envs.base import Observation, Outcome, World, Worlds
from lit_rl.envs.browser import check_packages
from lit_rl.envs.failures import Limits, WorldError
from lit_rl.envs.gym_host import SIZE, packed
from lit_rl.envs.tasks import Task, known_keys
from lit_rl.errors import ConfigError


class HostProcess:
    """A process with an environment, see `lit_rl.envs.gym_host`. idle: It has answered everything that it was asked."""

    def __init__(self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.process, self.reader, self.writer = process, reader, writer
        self.idle = True

    @staticmethod
    async def start() -> HostProcess:
        """Start a process; it finds the modules that this one finds."""
        here, there = socket.socketpair()
        with there:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "lit_rl.envs.gym_host", str(there.fileno())),
                pass_fds=[there.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                stdin=asyncio.subprocess.DEVNULL,
            )
        reader, writer = await asyncio.open_connection(sock=here)
        return HostProcess(process, reader, writer)

    async def ask(self, method: str, *arguments: object) -> object:
        """The answer of a method of `Host`. Raises ActionError for an action that is none, WorldError for a failure."""
        self.idle = False
        self.writer.write(packed((method, arguments)))
        try:
            await self.writer.drain()
            length = SIZE.unpack(await self.reader.readexactly(SIZE.size))[0]
            kind, result = pickle.loads(await self.reader.readexactly(length))
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise WorldError(f"the environment's process is gone during {method}") from error
        self.idle = True
        if kind == "refused":
            raise ActionError(str(result))
        if kind == "failed":
            raise WorldError(f"{method} of the environment failed: {result}")
        return result

    async def end(self) -> None:
        """Kill the process and wait for it."""
        self.writer.close()
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()


class GymWorld(World):
    """One environment. See `GymWorlds`."""

    def __init__(self, worlds: GymWorlds, host: HostProcess) -> None:
        super().__init__(worlds.limits)
        self.kinds = worlds.kinds
        self.worlds, self.host = worlds, host
        self.total, self.over, self.least = 0.0, False, 0.0

    async def on_reset(self, task: Task, seed: int) -> str:
        self.least = least_return(task)
        await self.host.ask("reset", seed, dict(task.params))
        return task.instruction

    async def on_screenshot(self) -> Observation:
        seen = await self.host.ask("render")
        if isinstance(seen, ndarray):
            return Observation(Image.fromarray(seen).convert("RGB"), ended=self.over)
        return Observation(text=str(seen), ended=self.over)

    async def on_execute(self, action: Action) -> None:
        if action.kind == "key":
            name = "+".join(action.keys)
            if name not in self.worlds.keys:
                raise ActionError(f"there is no key {name!r} here; there are {', '.join(self.worlds.keys)}")
            answer = await self.host.ask("step", self.worlds.keys[name])
        elif action.kind == "type":
            answer = await self.host.ask("step_text", action.text)
        else:
            return  # done and fail leave the environment as it is
        assert isinstance(answer, tuple)
        reward, self.over = answer
        self.total += reward

    async def on_evaluate(self) -> Outcome:
        success = self.total >= self.least
        return Outcome(success, float(success), {"return": self.total, "ended": self.over})

    async def on_close(self) -> None:
        await self.worlds.take_back(self.host)


def least_return(task: Task) -> float:
    """The sum of rewards from which on the task is done. Raises ConfigError, beginning with the key."""
    known_keys(task.evaluator, ("at_least",), "evaluator.")
    least = task.evaluator.get("at_least")
    if isinstance(least, bool) or not isinstance(least, int | float):
        raise ConfigError(f"evaluator.at_least: {least!r} is not a number; it is the sum of rewards from which on the task is done")
    return float(least)


class GymWorlds(Worlds):
    """Environments of gymnasium. The seed is that of their `reset`.

    A task has an `instruction`; its `params` are the `options` of `reset`; its evaluator is {"at_least": 195}, a bound of all rewards.
    An action is a `key` of `keys`, or typed as JSON, such as `[0.5, -1]`.

    Args:
        env_id: Name of the environment, such as `FrozenLake-v1`; `my_module:MyEnv-v0` imports the module first.
        options: Arguments of `gymnasium.make`.
        keys: Names of keys, and the action that each is: `{left: 0, right: 1}`. Names of several keys together are joined by +.
        render_mode: `rgb_array` for pictures, `ansi` for a text.
        limits: Seconds that each call to a world may take.
    """

    def __init__(
        self,
        *,
        env_id: str,
        options: dict[str, object] | None = None,
        keys: dict[str, int] | None = None,
        render_mode: Literal["rgb_array", "ansi"] = "rgb_array",
        limits: Limits | None = None,
    ) -> None:
        super().__init__(limits)
        self.env_id, self.options, self.render_mode = env_id, options or {}, render_mode
        self.keys: Mapping[str, int] = keys or {}
        kinds: tuple[Kind, ...] = ("key", "type") if keys else ("type",)
        self.kinds = frozenset(kinds)
        self._idle: list[HostProcess] = []
        self._checked: Task | None = None

    def check(self, task: Task) -> None:
        if not task.instruction:
            raise ConfigError("instruction: it is missing; an environment does not write its own")
        least_return(task)
        self._checked = task

    async def start(self) -> None:
        """Make an environment and look at it, since a package that draws may be missing. Raises ConfigError where that fails thrice."""
        check_packages("gymnasium")
        try:
            await self.attempts(self._look)
        except WorldError as error:
            raise ConfigError(f"the environment {self.env_id} cannot be made: {error}") from error

    async def _look(self, world: World, attempt: int) -> None:
        if self._checked is not None:
            await world.reset(self._checked, self._checked.seed or 0)
            await world.screenshot()

    async def stop(self) -> None:
        while self._idle:
            await self._idle.pop().end()

    async def on_open(self) -> GymWorld:
        if self._idle:
            return GymWorld(self, self._idle.pop())
        host = await HostProcess.start()
        try:
            await host.ask("make", self.env_id, self.render_mode, self.options)
        except BaseException:
            await asyncio.shield(asyncio.ensure_future(host.end()))
            raise
        return GymWorld(self, host)

    async def take_back(self, host: HostProcess) -> None:
        """Keep a process for the next episode, or end it where it owes an answer or is gone."""
        if host.idle and host.process.returncode is None:
            self._idle.append(host)
        else:
            await host.end()
