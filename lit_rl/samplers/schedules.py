"""Noise levels of a denoising path: Float64 tensors of N + 1 sigmas, from 1 (noise) down to 0 (data).

Published projects use different schedules for the same model, and "leave out the last step" means something else in each: SD3's ends
..., 0.28, 0.009, 0, the shifted one ..., 0.25, 0 (10 steps, shift 3). A run therefore logs its sigmas. A network's timestep is
1000 sigma, never truncated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lit_rl.errors import ConfigError


def shift_sigmas(sigmas: Float[Tensor, "n"], *, shift: float) -> Float[Tensor, "n"]:
    """s u / (1 + (s - 1) u). shift > 1 spends more steps near the noise; 1 changes nothing."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def flux_mu(image_tokens: int, *, base_shift: float = 0.5, max_shift: float = 1.15, base_len: int = 256, max_len: int = 4096) -> float:
    """base_shift + (max_shift - base_shift) (L - base_len) / (max_len - base_len), the logarithm of FLUX's shift at L image tokens."""
    return base_shift + (max_shift - base_shift) * (image_tokens - base_len) / (max_len - base_len)


def shifted_sigmas(num_steps: int, *, shift: float) -> Float[Tensor, "n"]:
    """shift(linspace(1, 0, N + 1)): DanceGRPO, MixGRPO, Flow-Factory."""
    return shift_sigmas(linear_sigmas(num_steps), shift=shift)


def linear_sigmas(num_steps: int) -> Float[Tensor, "n"]:
    """linspace(1, 0, N + 1)."""
    _check(num_steps)
    return torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)


def _check(num_steps: int) -> None:
    if num_steps < 1:
        raise ValueError(f"a denoising path needs at least one step, got num_steps={num_steps}")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Sigmas of rollouts and evaluation.

    Args:
        kind: The diffusers `pipeline`'s own, or equal steps from 1 to 0 that are `shifted` as DanceGRPO, MixGRPO and Flow-Factory do, or
            `linear` as they are.
        shift: s of the shifted schedule, sigma = s u / (1 + (s - 1) u).
    """

    kind: Literal["pipeline", "shifted", "linear"] = "pipeline"
    shift: float = 3.0

    def __post_init__(self) -> None:
        if self.shift <= 0:
            raise ConfigError(f"model.schedule.shift={self.shift} must be above 0; 1 shifts nothing, SD3 uses 3")

    def sigmas(self, num_steps: int, *, pipeline: Callable[[int], Float[Tensor, "n"]]) -> Float[Tensor, "n"]:
        """Float64 "N+1", from 1 to 0. pipeline: The pipeline's own for a number of steps."""
        if self.kind == "shifted":
            return shifted_sigmas(num_steps, shift=self.shift)
        return linear_sigmas(num_steps) if self.kind == "linear" else pipeline(num_steps)
