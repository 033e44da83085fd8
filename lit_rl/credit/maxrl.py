"""MaxRL: advantages whose mean gradient approaches that of maximum likelihood as groups grow."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_rl.credit.groups import group_statistics
from lit_rl.credit.rules import GroupCredit
from lit_rl.errors import ConfigError


@dataclass(kw_only=True)
class MaxRL(GroupCredit):
    """(reward - mean) / mean of the group: MaxRL (arXiv 2602.02710), for rewards that are not negative, such as 0 and 1.

    Hard prompts, whose mean is low, weigh more than they do with GRPO's standard deviation. Groups of one, and of mean 0, give 0.

    Args:
        eps: Added to the mean that divides; 0 as in the paper, 1e-6 in SkyRL.
    """

    eps: float = 0.0

    def __post_init__(self) -> None:
        if self.eps < 0:
            raise ConfigError(f"model.credit.eps={self.eps} must not be negative; the paper has 0")

    def relative(self, scores: Tensor, group: Tensor, lengths: Tensor) -> Tensor:
        """A group whose mean is negative says nothing either: dividing by it would turn good and bad around."""
        stats = group_statistics(scores, group)
        told = ~scores.isnan() & (stats.size > 1) & (stats.mean > 0)
        return torch.where(told, (scores.double() - stats.mean) / (stats.mean + self.eps), 0.0).to(scores.dtype)
