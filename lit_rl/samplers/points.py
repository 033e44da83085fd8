"""Points of the way from a clean sample to noise at which methods of the forward process train it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lit_rl.errors import ConfigError
from lit_rl.samplers.schedules import shift_sigmas


@dataclass(frozen=True, kw_only=True)
class Points:
    """Sigmas at which each sample is trained.

    Args:
        fraction: Points of a sample, as a share of `num_steps`; 0.99 leaves out one.
        kind: Points of the rollout's schedule, every sample in its own random order; or drawn from a distribution.
        range: Smallest and largest sigma that is trained. (0.5, 1) and `fraction` 0.3: a few points of the noisy half.
        shift: Of drawn sigmas, s u / (1 + (s - 1) u): above 1 towards noise. The schedule has its own.
    """

    fraction: float = 0.99
    kind: Literal["schedule", "uniform", "logit_normal"] = "schedule"
    range: tuple[float, float] = (0.0, 1.0)
    shift: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ConfigError(f"model.points.fraction={self.fraction} must be in (0, 1]; 0.99 leaves out one point")
        if not 0 <= self.range[0] < self.range[1] <= 1 or self.shift <= 0:
            raise ConfigError(f"model.points.range={list(self.range)} must rise within [0, 1], model.points.shift={self.shift} be above 0")

    def count(self, num_steps: int) -> int:
        """Points of each sample."""
        return max(1, int(num_steps * self.fraction))

    def check(self, schedule: Float[Tensor, "N"]) -> None:
        """Raise ConfigError where `range` holds fewer points of a rollout's N sigmas above 0 than are trained."""
        inside = self._inside(schedule)
        if self.kind == "schedule" and len(inside) < self.count(len(schedule)):
            raise ConfigError(
                f"model.points.fraction={self.fraction} asks for {self.count(len(schedule))} points of {len(schedule)}, and "
                f"model.points.range={list(self.range)} holds {len(inside)}: lower the first or widen the second; the schedule "
                f"is {[round(s, 3) for s in schedule.tolist()]}"
            )

    def draw(self, schedule: Float[Tensor, "N"], generator: torch.Generator) -> Float[Tensor, "S"]:
        """Sigmas of one sample."""
        count = self.count(len(schedule))
        if self.kind == "schedule":
            inside = self._inside(schedule)
            return inside[torch.randperm(len(inside), generator=generator)[:count]]
        u = torch.rand(count, generator=generator) if self.kind == "uniform" else torch.randn(count, generator=generator).sigmoid()
        low, high = self.range
        return low + (high - low) * shift_sigmas(u, shift=self.shift)

    def _inside(self, schedule: Tensor) -> Tensor:
        return schedule[(schedule >= self.range[0]) & (schedule <= self.range[1])]
