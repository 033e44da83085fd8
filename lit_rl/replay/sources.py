"""Protocols of what a method asks of the datamodule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from lit_rl.types import ALL, Info


class PromptSource(Protocol):
    """What a method asks of `trainer.datamodule`."""

    def prompts(self, iteration: int, count: int) -> Sequence[Info]:
        """The `count` prompts of an iteration, the same on every rank, a function of (seed, iteration) alone."""

    def examples(self, step: int, count: int, part: slice = ALL) -> tuple[Sequence[Info], Tensor]:
        """Of `count` supervised examples for warm-up step `step` those in `part`: prompts and images uint8 "B 3 H W"."""
