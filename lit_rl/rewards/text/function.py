"""A function of one's own as reward."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import difflib
import inspect
import logging
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import SupportsFloat, SupportsIndex

import torch
from torch import Tensor

from lit_rl.errors import ConfigError
from lit_rl.own_code import line_of, load_file
from lit_rl.rewards.base import TextReward
from lit_rl.types import Info

log = logging.getLogger(__name__)

ASKED = ("data_source", "solution_str", "ground_truth", "extra_info")
"""Keyword arguments of every call, as verl names them."""


class NoScoreError(ValueError):
    """A function returned something that is no score."""


class FunctionReward(TextReward):
    """Scores by a Python function in a file, plain or `async`, called for each answer as verl calls it:

        compute_score(data_source=..., solution_str=..., ground_truth=..., extra_info=..., **arguments) -> float | {"score": float, ...}

    data_source, ground_truth (of `reward_model`) and extra_info are the row's, None where it has none. Besides numbers and dictionaries a
    named tuple or dataclass with `score` may be returned, and of a tuple or list the first counts. A call that raises, takes too long or
    returns no number is NaN and counted, never 0.

    The file is imported as a module: it may import what lies beside it, absolutely or relatively, and start processes.

    A plain function runs in a thread: one that hangs keeps its thread until the process ends, and one that never lets other Python code
    run (a regular expression that explodes) stops training too. Let such a function be asked over HTTP.

    Args:
        path: Python file, or folder with an `__init__.py`.
        function: Its name there.
        name: Of the score.
        extras: Other numbers of the returned dictionary to log; they have weight 0 unless the run gives them one.
        arguments: Further keyword arguments.
        timeout_s: For one answer.
        concurrency: Answers scored at once.
    """

    remedy = "correct the function, or raise FunctionReward's timeout_s if it is slow"

    def __init__(
        self,
        path: str,
        function: str = "compute_score",
        *,
        name: str = "function",
        extras: list[str] | None = None,
        arguments: dict[str, object] | None = None,
        timeout_s: float = 60.0,
        concurrency: int = 16,
    ) -> None:
        self.path = Path(path).expanduser().absolute()
        self.path = self.path / "__init__.py" if (self.path / "__init__.py").is_file() else self.path
        if not self.path.is_file():
            raise ConfigError(f"path: {path!r} is no file; give the Python file that defines {function}")
        if clash := [key for key in (arguments or {}) if key in ASKED]:
            raise ConfigError(f"arguments: {clash[0]} is what the row says; name further arguments of {function} only")
        if repeated := [extra for extra in extras or [] if extra in (name, "score")]:
            raise ConfigError(f"extras: {repeated[0]} is the score itself, which is logged as {name}")
        if timeout_s <= 0 or concurrency < 1:
            raise ConfigError(f"timeout_s={timeout_s} must be above 0 and concurrency={concurrency} at least 1")
        self.function = function
        self.name, self.extras = name, extras or []
        self.outputs = (name, *self.extras)
        self.arguments = arguments or {}
        self.timeout_s, self.concurrency = timeout_s, concurrency
        self._call: Callable[..., object] | None = None
        self._counts = Counter(timeouts=0, errors=0)
        self._told: set[str] = set()

    def setup(self, *, rank: int, world_size: int, device: str) -> None:
        """Load the function and look at its arguments. Raises ConfigError."""
        self._call = load_function(self.path, self.function)
        check_signature(self._call, [*ASKED, *self.arguments], place=self.place)

    def counters(self) -> Mapping[str, float]:
        """Totals of `timeouts` and `errors`."""
        return dict(self._counts)

    def score(self, media: Sequence[str], info: Sequence[Info]) -> Mapping[str, Tensor]:
        """As `score_async`, from code without a loop."""
        return asyncio.run(self.score_async(media, info))

    async def score_async(self, media: Sequence[str], info: Sequence[Info]) -> Mapping[str, Tensor]:
        """Call the function for each answer, `concurrency` at once."""
        gate = asyncio.Semaphore(self.concurrency)
        rows = await asyncio.gather(*(self._one(gate, text, row) for text, row in zip(media, info, strict=True)))
        table = torch.tensor(rows, dtype=torch.float64).view(len(rows), len(self.outputs))
        return dict(zip(self.outputs, table.unbind(1), strict=True))

    async def _one(self, gate: asyncio.Semaphore, text: str, row: Info) -> list[float]:
        """Score and extras of one answer."""
        nothing = [math.nan] * len(self.outputs)
        truth = (row.get("reward_model") or {}).get("ground_truth")
        extra = copy.deepcopy(row.get("extra_info"))  # siblings share the row
        keywords = dict(zip(ASKED, (row.get("data_source"), str(text), truth, extra), strict=True))
        async with gate:
            limit = asyncio.timeout(self.timeout_s)
            try:
                async with limit:
                    return self._numbers(await self._answer(keywords | self.arguments))
            except (Exception, SystemExit) as error:  # foreign code: the reason goes into the message that stops a run
                self._note(error, row, late=limit.expired())
        return nothing

    def _note(self, error: BaseException, row: Info, *, late: bool) -> None:
        """Count a failure, and say which function it is, where it stands, which row it failed on and why."""
        self._counts["timeouts" if late else "errors"] += 1
        where = line_of(error, self.path)
        why = str(error) if isinstance(error, NoScoreError) else f"raised {type(error).__name__}: {error}"
        why = f"took longer than timeout_s={self.timeout_s:g}" if late else why
        why += f", at line {where.rpartition(':')[2]}" if where and not late else ""
        self.last_error = f"{self.place}: {why}, for row {row.get('id') or str(row.get('prompt'))[:60]!r}"
        if why not in self._told:
            self._told.add(why)
            log.warning("%s", self.last_error, exc_info=None if late else error)

    @property
    def place(self) -> str:
        """File, line and name of the function."""
        code = getattr(inspect.unwrap(self._call), "__code__", None) if self._call is not None else None
        line = f":{code.co_firstlineno}" if code is not None and Path(code.co_filename) == self.path else ""
        return f"{self.path}{line}: {self.function}"

    async def _answer(self, keywords: Mapping[str, object]) -> object:
        call = self._call = self._call or load_function(self.path, self.function)
        if inspect.iscoroutinefunction(call):
            return await call(**keywords)
        result = await in_thread(lambda: call(**keywords))
        return await result if inspect.isawaitable(result) else result

    def _numbers(self, result: object) -> list[float]:
        fields = fields_of(result)
        missing = [name for name in ("score", *self.extras) if name not in fields]
        if missing:
            raise NoScoreError(f"returned {sorted(map(str, fields))} without {missing[0]!r}")
        for name in fields.keys() - {"score", *self.extras} - self._told:
            self._told.add(name)
            log.info("%s returns %r too; name it in extras to have it logged", self.function, name)
        score = as_number(fields["score"])
        if not math.isfinite(score):
            raise NoScoreError(f"returned the score {score}")
        return [score, *(math.nan if fields[name] is None else as_number(fields[name]) for name in self.extras)]


def load_function(path: Path, name: str) -> Callable[..., object]:
    """A function from a Python file, which is run. Raises ConfigError where there is none of this name."""
    module = load_file(path)
    found = getattr(module, name, None)
    if not callable(found):
        there = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        near = difflib.get_close_matches(name, there, n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"function: {path} defines no function {name!r}, only {', '.join(there) or 'none at all'}{meant}")
    return found


def check_signature(call: Callable[..., object], keywords: Iterable[str], *, place: str) -> None:
    """Raise ConfigError where a function cannot be called with arguments of these names."""
    try:
        signature = inspect.signature(call)
    except (ValueError, TypeError):  # written in C
        return
    try:
        signature.bind(**dict.fromkeys(keywords))
    except TypeError as error:
        raise ConfigError(
            f"{place}{signature} cannot be called: {error}; it is called with {', '.join(f'{name}=...' for name in keywords)}"
        ) from error


def fields_of(result: object) -> Mapping[str, object]:
    """The parts of a result by name: of a mapping, named tuple or dataclass its own, of a tuple or list the first, as verl takes it."""
    if isinstance(result, Mapping):
        return result
    if hasattr(result, "_asdict"):
        return result._asdict()  # type: ignore[no-any-return]
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        return {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}  # slots have no vars
    if isinstance(result, list | tuple):
        if not result:
            raise NoScoreError("returned an empty list")
        return {"score": result[0]}
    return {"score": result}


def as_number(value: object) -> float:
    """A number of Python, numpy, torch or an enumeration as float."""
    value = value.value if isinstance(value, Enum) else value
    if value is None:
        raise NoScoreError('returned None; expected a number or {"score": number}')
    try:
        number = value.item() if hasattr(value, "item") else value
        if not isinstance(number, str | bytes | SupportsFloat | SupportsIndex):
            raise TypeError("not a number")
        return float(number)
    except (TypeError, ValueError, RuntimeError) as error:
        raise NoScoreError(f"returned {value!r:.80}; expected a number") from error


async def in_thread(call: Callable[[], object]) -> object:
    """Await `call()` in a thread of its own that ends with the process: an executor would wait for one that hangs."""
    loop, answer = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()

    def settle(result: object, error: BaseException | None) -> None:
        if not answer.done():
            answer.set_exception(error) if error is not None else answer.set_result(result)

    def run() -> None:
        try:
            result, error = call(), None
        except Exception as caught:  # handed to whoever awaits
            result, error = None, renamed(caught) if isinstance(caught, StopIteration) else caught
        except BaseException as caught:  # it must not end the loop that awaits it
            result, error = None, renamed(caught)
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name="scoring-function", daemon=True).start()
    return await answer


def renamed(error: BaseException) -> RuntimeError:
    """An error that a coroutine cannot raise for another one, as one that it can, with its trace."""
    return RuntimeError(f"{type(error).__name__}: {error}").with_traceback(error.__traceback__)
