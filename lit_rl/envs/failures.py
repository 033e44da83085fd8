"""Failures of episodes: whose fault they are, and how long a call to a world may take."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

from lit_rl.envs.actions import ActionError
from lit_rl.errors import ConfigError

T = TypeVar("T")


class Status(StrEnum):
    """The end of a trajectory; each ends in exactly one way.

    What the policy causes has its reward, and is in the statistics of its group and in the loss: else it would learn to cause what is
    left out. What the infrastructure causes has no reward and is in neither: else a lost browser would teach that the task is bad.
    """

    SUCCESS = "success"
    FAILURE = "failure"
    MAX_TURNS = "max_turns"
    TASK_TIMEOUT = "task_timeout"
    PARSE_ERROR = "parse_error"
    ENV_ERROR = "env_error"
    RESET_FAILED = "reset_failed"
    SERVER_ERROR = "server_error"
    CANCELLED = "cancelled"

    @property
    def counts(self) -> bool:
        """True where the policy caused it: the trajectory keeps its reward, its vote and its place in the loss."""
        return self not in (Status.ENV_ERROR, Status.RESET_FAILED, Status.SERVER_ERROR, Status.CANCELLED)


class WorldError(RuntimeError):
    """A world that failed, by no fault of the policy. status: `RESET_FAILED` before the first screenshot, else `ENV_ERROR`."""

    def __init__(self, message: str, status: Status = Status.ENV_ERROR) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Limits:
    """Seconds by the wall clock that each call to a world may take; a call that takes longer ends as a failure of the world.

    Args:
        reset: Opening a world and bringing it to the start of a task.
        screenshot: One observation.
        execute: One action, without the seconds that a `wait` asks for.
        evaluate: Finding out whether the task is done.
        close: Giving the world back.
    """

    reset: float = 60.0
    screenshot: float = 30.0
    execute: float = 30.0
    evaluate: float = 30.0
    close: float = 30.0

    def __post_init__(self) -> None:
        for name, seconds in vars(self).items():
            if not seconds > 0:
                raise ConfigError(f"limits.{name}={seconds:g} leaves no time; give seconds above 0")


async def limited(work: Awaitable[T], seconds: float, name: str, knob: str) -> T:
    """The result of `work`; raises WorldError for what takes longer than `seconds`, and for any failure of the world's."""
    try:
        async with asyncio.timeout(seconds) as limit:
            return await work
    except (ActionError, ConfigError, WorldError):
        raise
    except Exception as error:
        if isinstance(error, TimeoutError) and limit.expired():
            raise WorldError(f"{name} took longer than {seconds:g} s, which {knob} allows") from error
        line = next(iter(str(error).splitlines()), "")  # a browser's error brings its whole log
        raise WorldError(f"{name} failed: {type(error).__name__}: {line}") from error
