"""The process that an environment of gymnasium lives in: `python -m lit_rl.envs.gym_host FD`. It answers requests on a socket, one by one.

It ends with the process that started it: at the end of the socket, or, where the environment hangs, by a signal of the kernel's (Linux).
"""

from __future__ import annotations

import ctypes
import io
import json
import pickle
import signal
import socket
import struct
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from numpy import ndarray

if TYPE_CHECKING:
    import gymnasium

SIZE = struct.Struct("!Q")
PR_SET_PDEATHSIG = 1


class Refused(Exception):
    """An action that is none of the environment's action space."""


@dataclass
class Host:
    """An environment, made at the first request."""

    made: gymnasium.Env[object, object] | None = None

    @property
    def env(self) -> gymnasium.Env[object, object]:
        """The environment, once it was made."""
        if self.made is None:
            raise RuntimeError("make comes first")
        return self.made

    def make(self, name: str, render_mode: str, options: Mapping[str, object]) -> None:
        """Make the environment."""
        import gymnasium

        make: Callable[..., gymnasium.Env[object, object]] = gymnasium.make
        self.made = make(name, render_mode=render_mode, **options)

    def reset(self, seed: int, options: Mapping[str, object]) -> None:
        """Begin an episode."""
        self.env.reset(seed=seed, options=dict(options))

    def step(self, action: object) -> tuple[float, bool]:
        """Reward, and whether the episode has ended."""
        _, reward, terminated, truncated, _ = self.env.step(action)
        return float(reward), bool(terminated or truncated)

    def step_text(self, text: str) -> tuple[float, bool]:
        """A step whose action is written as JSON."""
        space = self.env.action_space
        try:
            action = space.from_jsonable([json.loads(text)])[0]
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise Refused(f"{text!r} is no JSON of an action of {space}: {error}") from error
        if not space.contains(action):
            raise Refused(f"{text!r} is no action of {space}")
        return self.step(action)

    def render(self) -> ndarray | str:
        """The picture "H W 3", or the text."""
        seen = self.env.render()
        return seen if isinstance(seen, ndarray) else str(seen)


def serve(file: io.BufferedRWPair) -> None:
    """Answer ("ok", result), ("refused", sentence) or ("failed", sentence) to each (method, arguments), up to the end of the file."""
    host = Host()
    while head := file.read(SIZE.size):
        method, arguments = pickle.loads(file.read(*SIZE.unpack(head)))
        try:
            answer: tuple[str, object] = ("ok", getattr(host, method)(*arguments))
        except Refused as error:
            answer = ("refused", str(error))
        except Exception as error:
            answer = ("failed", f"{type(error).__name__}: {error}")
        file.write(packed(answer))
        file.flush()


def packed(message: object) -> bytes:
    """A message with its length before it."""
    body = pickle.dumps(message)
    return SIZE.pack(len(body)) + body


def main() -> None:
    """Serve on the socket whose number is the first argument."""
    if Path("/proc/self").exists():
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    with socket.socket(fileno=int(sys.argv[1])) as connection, connection.makefile("rwb") as file:
        serve(file)


if __name__ == "__main__":
    main()
