"""A function of one's own as reward."""

from __future__ import annotations

import asyncio
import copy
import importlib.util
import inspect
import logging
import math
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_rl.errors import ConfigError
from lit_rl.rewards.base import TextReward
from lit_rl.types import Info

log = logging.getLogger(__name__)


class FunctionReward(TextReward):
    """Scores by a Python function in a file, plain or `async`, called for each answer as verl calls it:

        compute_score(data_source=..., solution_str=..., ground_truth=..., extra_info=..., **arguments) -> float | {"score": float, ...}

    data_source, ground_truth (of `reward_model`) and extra_info are the row's, None where it has none. A call that raises, takes too long
    or returns no number is NaN and counted, never 0.

    A plain function runs in a thread: one that hangs keeps its thread until the process ends, and one that never lets other Python code
    run (a regular expression that explodes) stops training too. Let such a function be asked over HTTP.

    Args:
        path: Python file.
        function: Its name there.
        name: Of the score.
        extras: Other numbers of the returned dictionary to log; they have weight 0 unless the run gives them one.
        arguments: Further keyword arguments.
        timeout_s: For one answer.
        concurrency: Answers scored at once.
    """

    def __init__(
        self,
        path: str,
        function: str = "compute_score",
        *,
        name: str = "function",
        extras: list[str] | None = None,
        arguments: dict[str, Any] | None = None,
        timeout_s: float = 60.0,
        concurrency: int = 16,
    ) -> None:
        self.path = Path(path).expanduser()
        if not self.path.is_file():
            raise ConfigError(f"path: {path!r} is no file; give the Python file that defines {function}")
        if timeout_s <= 0 or concurrency < 1:
            raise ConfigError(f"timeout_s={timeout_s} must be above 0 and concurrency={concurrency} at least 1")
        self.function = function
        self.name, self.extras = name, extras or []
        self.outputs = (name, *self.extras)
        self.arguments = arguments or {}
        self.timeout_s, self.concurrency = timeout_s, concurrency
        self._call: Callable[..., Any] | None = None
        self._counts = Counter(timeouts=0, errors=0)
        self._told: set[str] = set()

    def setup(self, *, rank: int, world_size: int, device: str) -> None:
        self._call = load_function(self.path, self.function)

    def counters(self) -> Mapping[str, float]:
        return dict(self._counts)

    def score(self, media: Sequence[str], info: Sequence[Info]) -> Mapping[str, Tensor]:  # type: ignore[override]
        return asyncio.run(self.score_async(media, info))  # type: ignore[arg-type]

    async def score_async(self, media: Sequence[str], info: Sequence[Info]) -> Mapping[str, Tensor]:  # type: ignore[override]
        gate = asyncio.Semaphore(self.concurrency)
        rows = await asyncio.gather(*(self._one(gate, text, row) for text, row in zip(media, info, strict=True)))
        table = torch.tensor(rows, dtype=torch.float64).view(len(rows), len(self.outputs))
        return dict(zip(self.outputs, table.unbind(1), strict=True))

    async def _one(self, gate: asyncio.Semaphore, text: str, row: Info) -> list[float]:
        """Score and extras of one answer."""
        nothing = [math.nan] * len(self.outputs)
        asked = {
            "data_source": row.get("data_source"),
            "solution_str": text,
            "ground_truth": (row.get("reward_model") or {}).get("ground_truth"),
            "extra_info": copy.deepcopy(row.get("extra_info")),  # siblings share the row
        }
        async with gate:
            try:
                result = await asyncio.wait_for(self._answer(asked | self.arguments), self.timeout_s)
                return self._numbers(result)
            except TimeoutError:
                self._counts["timeouts"] += 1
                self.last_error = f"{self.function} took longer than timeout_s={self.timeout_s:g}"
            except Exception as error:  # foreign code: the reason goes into the message that stops a run
                self._counts["errors"] += 1
                self.last_error = f"{self.function}: {type(error).__name__}: {error}"
                if self.last_error not in self._told:
                    self._told.add(self.last_error)
                    log.warning("%s in %s", self.last_error, self.path, exc_info=error)
        return nothing

    async def _answer(self, asked: Mapping[str, Any]) -> Any:
        call = self._call = self._call or load_function(self.path, self.function)
        return await call(**asked) if inspect.iscoroutinefunction(call) else await in_thread(lambda: call(**asked))

    def _numbers(self, result: Any) -> list[float]:
        fields = result if isinstance(result, Mapping) else {"score": result}
        missing = [name for name in ("score", *self.extras) if name not in fields]
        if missing:
            raise ValueError(f"returned {sorted(fields)} without {missing[0]!r}")
        for name in fields.keys() - {"score", *self.extras} - self._told:
            self._told.add(name)
            log.info("%s returns %r too; name it in extras to have it logged", self.function, name)
        numbers = [float(fields[name]) for name in ("score", *self.extras)]
        if not math.isfinite(numbers[0]):
            raise ValueError(f"returned the score {numbers[0]}")
        return numbers


def load_function(path: Path, name: str) -> Callable[..., Any]:
    """A function from a Python file, which is run. Raises ConfigError where there is none of this name."""
    spec = importlib.util.spec_from_file_location(f"reward_function_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"path: {path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = getattr(module, name, None)
    if not callable(found):
        there = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise ConfigError(f"function: {path} defines no function {name!r}, only {', '.join(there) or 'none at all'}")
    return found


async def in_thread(call: Callable[[], Any]) -> Any:
    """What `call` returns. In a thread of its own that ends with the process: an executor would wait for one that hangs."""
    loop, answer = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if not answer.done():
            answer.set_exception(error) if error is not None else answer.set_result(result)

    def run() -> None:
        try:
            result, error = call(), None
        except BaseException as caught:  # handed to whoever awaits
            result, error = None, caught
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name="scoring-function", daemon=True).start()
    return await answer
