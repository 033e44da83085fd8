"""How rewards become advantages of the samples of flow models, as one block of a run's YAML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lit_rl.credit.groups import PromptTracker, Scale, Weights, gdpo_advantages, group_advantages, has_any_reward, per_reward_advantages
from lit_rl.errors import ConfigError


@dataclass
class Advantage:
    """The baseline, divisor and bound of an advantage of flow models.

    Attributes:
        kind: How several rewards become one advantage: that of their weighted `sum`; the weighted sum of each reward's own advantage
            (`per_reward`); GDPO's, which normalises that once more over the batch (arXiv 2601.05242); `history`: relative to everything
            the same prompt ever scored (per-prompt statistics that persist over iterations); `reinforce`: of the sum, relative to the
            batch instead of the group (REINFORCE++, arXiv 2501.03262). A sample that lacks a score which counts for it has no sum, and is
            left out; with `per_reward` and `gdpo` it is left out of that reward alone.
        std: Divisor: standard deviation of the whole batch over all processes, of the group, the largest of all groups, or none. None:
            batch; for `history` the prompt's own over all its rewards. Not for `gdpo`, which has its own two.
        ddof: 1 for the unbiased standard deviation (DanceGRPO), 0 otherwise.
        eps: Added to the divisor.
        trim: Share of each group, its lowest rewards, left out of the group's mean and deviation (MixGRPO); for `sum` and `per_reward`.
        clip: Advantages are clamped to [-clip, clip].
        drop_zero: Leave what has advantage 0 out of the mean, and spend no forward on it.
    """

    kind: Literal["sum", "per_reward", "gdpo", "history", "reinforce"] = "sum"
    std: Scale | None = None
    ddof: int = 0
    eps: float = 1e-4
    trim: float = 0.0
    clip: float = 5.0
    drop_zero: bool = False

    def __post_init__(self) -> None:
        if self.clip <= 0:
            raise ConfigError(f"model.advantage.clip={self.clip} must be above 0; Flow-GRPO uses 5")
        if self.eps < 0:
            raise ConfigError(f"model.advantage.eps={self.eps} must not be negative; Flow-GRPO uses 1e-4")
        if not 0 <= self.trim < 1 or (self.trim and self.kind not in ("sum", "per_reward")):
            raise ConfigError(f"model.advantage.trim={self.trim} must be in [0, 1), and 0 for kind={self.kind}, which knows no trimming")
        if self.kind in ("gdpo", "reinforce") and self.std is not None:
            raise ConfigError(f"model.advantage.std={self.std} has no meaning for {self.kind}: leave it out")
        if self.kind == "history" and (self.std not in (None, "batch") or self.ddof):
            raise ConfigError("model.advantage.kind=history divides by the prompt's own std or, with std: batch, the batch's; ddof is 0")

    def tracker(self) -> PromptTracker | None:
        """The statistics that `history` needs; they belong into the checkpoint."""
        return PromptTracker(std="batch" if self.std == "batch" else "prompt", eps=self.eps) if self.kind == "history" else None

    def usable(self, rewards: Mapping[str, Tensor], total: Tensor, *, weights: Weights) -> Tensor:
        """Bool "B": the samples that the loss takes, those that have what their advantage is made of."""
        return has_any_reward(rewards, weights) if self.kind in ("per_reward", "gdpo") else ~total.isnan()

    def __call__(
        self,
        rewards: Mapping[str, Tensor],
        total: Tensor,
        group: Tensor,
        *,
        weights: Weights,
        prompts: Sequence[str],
        tracker: PromptTracker | None,
    ) -> Tensor:
        """Advantages Float64 "B" of the samples of all processes; NaN rewards give 0.

        rewards: by name, Float64 "B"; total: their weighted sum; group: Int "B"; prompts: B texts.
        """
        std: Scale = self.std or "batch"
        if tracker is not None:
            values = tracker.update(prompts, total)
        elif self.kind == "gdpo":
            values = gdpo_advantages(dict(rewards), group, weights=weights, ddof=self.ddof, eps=self.eps)
        elif self.kind == "per_reward":
            values = per_reward_advantages(dict(rewards), group, weights=weights, std=std, ddof=self.ddof, eps=self.eps, trim=self.trim)
        else:
            compared = torch.zeros_like(group) if self.kind == "reinforce" else group
            values = group_advantages(total, compared, std=std, ddof=self.ddof, eps=self.eps, trim=self.trim)
        return values.clamp(-self.clip, self.clip)
