"""Numbers of an epoch, gathered over minibatches and processes, which do not depend on how the work was cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Rows = dict[str, tuple[str, float, float]]
"""By name: what becomes of it, and two sums; plain, so that processes can send them to each other."""


class Meters:
    """Weighted means, largest values and sums. Tensors stay where they are until `read`: on a GPU nothing waits for them."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[str, Tensor]] = {}

    def __bool__(self) -> bool:
        return bool(self._seen)

    def mean(self, values: Mapping[str, Tensor | float], *, weight: Tensor | float = 1.0) -> None:
        """0-d values that count `weight` each; what has weight 0 does not count at all, NaN included."""
        for name, value in values.items():
            pair = torch.stack([torch.as_tensor(part, device=_device(value)).detach().double() for part in (value, weight)])
            pair = torch.where(pair[1] > 0, torch.stack([pair[0] * pair[1], pair[1]]), 0.0)
            self._seen[name] = ("mean", self._seen[name][1] + pair if name in self._seen else pair)

    def largest(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            pair = value.detach().double().expand(2)
            self._seen[name] = ("largest", torch.maximum(self._seen[name][1], pair) if name in self._seen else pair)

    def count(self, name: str) -> None:
        """One more of it on this process."""
        self._seen[name] = ("count", self._seen[name][1] + 1 if name in self._seen else torch.ones(2, dtype=torch.float64))

    def state_dict(self) -> dict[str, tuple[str, Tensor]]:
        return dict(self._seen)

    def load_state_dict(self, state: Mapping[str, tuple[str, Tensor]], *, device: torch.device) -> None:
        self._seen = {name: (kind, pair.to(device)) for name, (kind, pair) in state.items()}

    def read(self, everyone: Callable[[Rows], Sequence[Rows]]) -> dict[str, float]:
        """The numbers over all processes, and start anew. everyone: what each of them has; collective."""
        seen, self._seen = self._seen, {}
        rows = everyone({name: (kind, *pair.tolist()) for name, (kind, pair) in seen.items()})
        return {name: _joined([row[name] for row in rows if name in row]) for name in dict.fromkeys(name for row in rows for name in row)}


def _joined(parts: Sequence[tuple[str, float, float]]) -> float:
    kind, values, weights = parts[0][0], [part[1] for part in parts], [part[2] for part in parts]
    if kind == "mean":
        return sum(values) / sum(weights) if sum(weights) else 0.0
    return max(values)  # optimizer steps are counted alike everywhere


def _device(value: Tensor | float) -> torch.device | None:
    return value.device if isinstance(value, Tensor) else None
