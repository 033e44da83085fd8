"""How rewards become advantages, as one block of a run's YAML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lit_rl.credit.groups import PromptTracker, Scale, gdpo_advantages, group_advantages, per_reward_advantages
from lit_rl.errors import ConfigError


@dataclass
class Advantage:
    """What an advantage is relative to, divided by and clamped to.

    Attributes:
        kind: How several rewards become one advantage: that of their weighted `sum`; the weighted sum of each reward's own advantage
            (`per_reward`); GDPO's, which normalises that once more over the batch (arXiv 2601.05242); `history`: relative to everything
            the same prompt ever scored (per-prompt statistics that persist over iterations).
        std: Divisor: standard deviation of the whole batch over all processes, of the group, the largest of all groups, or none. None:
            batch; for `history` the prompt's own over all its rewards. Not for `gdpo`, which has its own two.
        ddof: 1 for the unbiased standard deviation (DanceGRPO), 0 otherwise.
        eps: Added to the divisor.
        clip: Advantages are clamped to [-clip, clip].
        drop_zero: Leave what has advantage 0 out of the mean, and spend no forward on it.
    """

    kind: Literal["sum", "per_reward", "gdpo", "history"] = "sum"
    std: Scale | None = None
    ddof: int = 0
    eps: float = 1e-4
    clip: float = 5.0
    drop_zero: bool = False

    def __post_init__(self) -> None:
        if self.clip <= 0:
            raise ConfigError(f"model.advantage.clip={self.clip} must be above 0; Flow-GRPO uses 5")
        if self.eps < 0:
            raise ConfigError(f"model.advantage.eps={self.eps} must not be negative; Flow-GRPO uses 1e-4")

        if self.kind == "gdpo" and self.std is not None:
            raise ConfigError(f"model.advantage.std={self.std} has no meaning for gdpo: leave it out")
        if self.kind == "history" and (self.std not in (None, "batch") or self.ddof):
            raise ConfigError("model.advantage.kind=history divides by the prompt's own std or, with std: batch, the batch's; ddof is 0")

    def tracker(self) -> PromptTracker | None:
        """The statistics that `history` needs; they belong into the checkpoint."""
        return PromptTracker(std="batch" if self.std == "batch" else "prompt", eps=self.eps) if self.kind == "history" else None

    def __call__(
        self,
        rewards: Mapping[str, Tensor],
        total: Tensor,
        group: Tensor,
        *,
        weights: Mapping[str, float],
        prompts: Sequence[str],
        tracker: PromptTracker | None,
    ) -> Tensor:
        """Advantages Float64 "B" of the samples of all processes; NaN rewards give 0.

        rewards: by name, Float64 "B"; total: their weighted sum; group: Int "B"; prompts: B texts.
        """
        if tracker is not None:
            values = tracker.update(prompts, total)
        elif self.kind == "gdpo":
            values = gdpo_advantages(dict(rewards), group, weights=weights, ddof=self.ddof, eps=self.eps)
        elif self.kind == "per_reward":
            values = per_reward_advantages(dict(rewards), group, weights=weights, std=self.std or "batch", ddof=self.ddof, eps=self.eps)
        else:
            values = group_advantages(total, group, std=self.std or "batch", ddof=self.ddof, eps=self.eps)
        return values.clamp(-self.clip, self.clip)
