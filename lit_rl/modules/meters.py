"""Numbers of an epoch, gathered over minibatches and processes, which do not depend on how the work was cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import isnan

import torch
from torch import Tensor

Rows = dict[str, tuple[str, float, float]]
"""By name: what becomes of it, and two sums; plain, so that processes can send them to each other."""

Values = Sequence[Tensor | float]
"""0-d values, those of a mean followed by their weight."""

KEPT = 256
"""Calls whose values wait to be read."""


class Meters:
    """Weighted means, largest values and sums. Values stay where they are until many are read at once: on a GPU nothing waits for them."""

    def __init__(self) -> None:
        self._sums: Rows = {}
        self._waiting: list[tuple[str, Sequence[str], Values]] = []  # what becomes of them, their names, and the values

    def __bool__(self) -> bool:
        return bool(self._sums or self._waiting)

    def mean(self, values: Mapping[str, Tensor | float], *, weight: Tensor | float = 1.0) -> None:
        """0-d values that count `weight` each; what has weight 0 does not count at all, NaN included."""
        self._note("mean", tuple(values), [*values.values(), weight])

    def largest(self, values: Mapping[str, Tensor]) -> None:
        self._note("largest", tuple(values), list(values.values()))

    def count(self, name: str) -> None:
        """One more of it on this process."""
        self._note("count", (name,), [1.0])

    def copy(self) -> Meters:
        """The same numbers; what is taken in later is not in both."""
        other = Meters()
        other._sums, other._waiting = dict(self._sums), list(self._waiting)
        return other

    def state_dict(self) -> dict[str, tuple[str, Tensor]]:
        self._settle()
        return {name: (kind, torch.tensor(pair, dtype=torch.float64)) for name, (kind, *pair) in self._sums.items()}

    def load_state_dict(self, state: Mapping[str, tuple[str, Tensor]]) -> None:
        self._sums, self._waiting = {name: (kind, float(pair[0]), float(pair[1])) for name, (kind, pair) in state.items()}, []

    def read(self, everyone: Callable[[Rows], Sequence[Rows]]) -> dict[str, float]:
        """The numbers over all processes, and start anew. everyone: what each of them has; collective."""
        self._settle()
        own, self._sums = self._sums, {}
        rows = everyone(own)
        return {name: _joined([row[name] for row in rows if name in row]) for name in dict.fromkeys(name for row in rows for name in row)}

    def _note(self, kind: str, names: Sequence[str], values: Values) -> None:
        self._waiting.append((kind, names, [value.detach() if isinstance(value, Tensor) else value for value in values]))
        if len(self._waiting) >= KEPT:
            self._settle()

    def _settle(self) -> None:
        """Read what waits, in one go, and add it up in the order in which it came."""
        waiting, self._waiting = self._waiting, []
        numbers = iter(_numbers([value for _, _, values in waiting for value in values]))
        for kind, names, values in waiting:
            here = [next(numbers) for _ in values]
            weight = here[-1] if kind == "mean" else 1.0
            for name, value in zip(names, here):
                self._sums[name] = _added(kind, self._sums.get(name), value, weight)


def _numbers(values: Values) -> list[float]:
    """All values in double precision; those of a device are read together."""
    result = [0.0 if isinstance(value, Tensor) else float(value) for value in values]
    tensors = {i: value for i, value in enumerate(values) if isinstance(value, Tensor)}
    for device in {value.device for value in tensors.values()}:
        here = {i: value for i, value in tensors.items() if value.device == device}
        double = torch.zeros((), dtype=torch.float64, device=device)  # all become double beside it
        for i, number in zip(here, torch.stack([*here.values(), double]).tolist()):
            result[i] = number
    return result


def _added(kind: str, before: tuple[str, float, float] | None, value: float, weight: float) -> tuple[str, float, float]:
    if kind == "largest":
        largest = value if before is None or value > before[1] or isnan(value) else before[1]
        return kind, largest, largest
    _, total, weights = before or (kind, 0.0, 0.0)
    return (kind, total + value * weight, weights + weight) if weight > 0 else (kind, total, weights)


def _joined(parts: Sequence[tuple[str, float, float]]) -> float:
    kind, values, weights = parts[0][0], [part[1] for part in parts], [part[2] for part in parts]
    if kind == "mean":
        return sum(values) / sum(weights) if sum(weights) else 0.0
    return max(values)  # optimizer steps are counted alike everywhere
