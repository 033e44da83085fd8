"""The options of a merge."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch

from lit_rl.checkpoints.tensors import Facts
from lit_rl.errors import ConfigError
from lit_rl.surgery.formulas import METHODS, Method

PRECISIONS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Settings:
    """The options of `lit_rl.surgery.merging.merge`, one weight for each input."""

    method: Method
    weights: Sequence[float]
    density: float
    dtype: str | None
    seed: int

    def check(self, inputs: int) -> None:
        """Raise ConfigError for options that fit no merge of so many inputs."""
        if self.method not in get_args(Method):
            raise ConfigError(f"method {self.method!r} is none: choose one of {', '.join(METHODS)}")
        if inputs < 1:
            raise ConfigError("name at least one input")
        if len(self.weights) != inputs:
            raise ConfigError(f"there are {inputs} inputs and {len(self.weights)} weights: give one weight for each input")
        if not all(math.isfinite(weight) for weight in self.weights):
            raise ConfigError(f"weights {list(self.weights)} must be finite")
        if self.method == "slerp" and inputs != 2:
            raise ConfigError(f"method slerp is of two models, and there are {inputs} inputs: use linear")
        if self.method in ("linear", "slerp") and abs(sum(self.weights)) < 1e-12:
            raise ConfigError(f"weights {list(self.weights)} sum to 0, by which method {self.method} divides: use task_arithmetic")
        if not 0 < self.density <= 1:
            raise ConfigError(f"density {self.density} must be in (0, 1]")
        if self.dtype is not None and self.dtype not in PRECISIONS:
            raise ConfigError(f"dtype {self.dtype!r} must be one of {', '.join(PRECISIONS)}")

    def precise(self, facts: Facts) -> Facts:
        """The shape in the precision that is written; numbers that are no floats keep theirs."""
        return Facts(facts.shape, getattr(torch, self.dtype)) if self.dtype and facts.dtype.is_floating_point else facts
