"""How rewards become advantages, as one block of a run's YAML: `Advantage` for flow models, the other classes for language models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lit_rl.credit.groups import PromptTracker, Scale, Weights, gdpo_advantages, group_advantages, leave_one_out, per_reward_advantages
from lit_rl.credit.tokens import (
    Reduce,
    gae,
    length_weighted_advantages,
    overlong_penalty,
    pass_at_k_advantages,
    rewards_to_go,
    spread,
    whiten,
)
from lit_rl.credit.trajectories import Everywhere, here, one_vote
from lit_rl.errors import ConfigError


@dataclass
class Advantage:
    """The baseline, divisor and bound of an advantage of flow models.

    Attributes:
        kind: How several rewards become one advantage: that of their weighted `sum`; the weighted sum of each reward's own advantage
            (`per_reward`); GDPO's, which normalises that once more over the batch (arXiv 2601.05242); `history`: relative to everything
            the same prompt ever scored (per-prompt statistics that persist over iterations); `reinforce`: of the sum, relative to the
            batch instead of the group (REINFORCE++, arXiv 2501.03262).
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


# ---------------------------------------------------------------------- language models
class Credit(ABC):
    """Advantages of tokens from their rewards.

    What has to be known of other processes comes from two functions: `total` sums a tensor over them, and `everywhere` gives the rows
    here of a function of all rows, as the answers to a prompt may be on several processes.
    """

    siblings: ClassVar[bool] = True
    """An answer is compared with others to the same prompt."""

    @abstractmethod
    def __call__(
        self,
        rewards: Float[Tensor, "B S"],
        group: Int[Tensor, "B"],
        mask: Bool[Tensor, "B S"],
        *,
        has_reward: Bool[Tensor, "B"],
        total: Reduce,
        trajectory: Int[Tensor, "B"] | None = None,
        everywhere: Everywhere = here,
    ) -> Float[Tensor, "B S"]:
        """Advantages, 0 where the mask is False.

        rewards: float64, of each token; a trajectory of several rows has its score once, in `lit_rl.credit.trajectories.closing_rows`.
        has_reward: rows that have a reward. trajectory: ids of the trajectories that rows belong to; None: each is one.
        """


class GroupCredit(Credit):
    """The same advantage on all tokens of an answer or, where it has several, on those of all rows of a trajectory."""

    def __call__(
        self,
        rewards: Tensor,
        group: Tensor,
        mask: Tensor,
        *,
        has_reward: Tensor,
        total: Reduce,
        trajectory: Tensor | None = None,
        everywhere: Everywhere = here,
    ) -> Tensor:
        scores = torch.where(has_reward, rewards.sum(1), torch.nan)
        columns = (scores, group, mask.sum(1)) if trajectory is None else (scores, group, mask.sum(1), trajectory)
        return spread(everywhere(partial(one_vote, self.relative), *columns), mask)

    @abstractmethod
    def relative(self, scores: Float[Tensor, "B"], group: Int[Tensor, "B"], lengths: Int[Tensor, "B"]) -> Float[Tensor, "B"]:
        """The advantage relative to its group of an answer, or of a trajectory; 0 for scores that are NaN. Of all processes."""


@dataclass(kw_only=True)
class Group(GroupCredit):
    """Reward - mean of the group: GRPO (arXiv 2402.03300).

    Args:
        std: Divide by the group's standard deviation (unbiased) + 1e-6; False: Dr. GRPO (arXiv 2503.20783).
    """

    std: bool = True

    def relative(self, scores: Tensor, group: Tensor, lengths: Tensor) -> Tensor:
        return group_advantages(scores, group, std="group" if self.std else "none", ddof=1, eps=1e-6)


@dataclass(kw_only=True)
class LeaveOneOut(GroupCredit):
    """Reward - mean of the others in the group: RLOO (arXiv 2402.14740)."""

    def relative(self, scores: Tensor, group: Tensor, lengths: Tensor) -> Tensor:
        return leave_one_out(scores, group)


@dataclass(kw_only=True)
class LengthWeighted(GroupCredit):
    """Reward - mean of the group in which longer answers count more: OPO (arXiv 2505.23585)."""

    def relative(self, scores: Tensor, group: Tensor, lengths: Tensor) -> Tensor:
        return length_weighted_advantages(scores, lengths, group)


@dataclass(kw_only=True)
class PassAtK(GroupCredit):
    """The lead of the best answer of a group for that answer, 0 for the others (arXiv 2503.19595).

    Args:
        std: Divide by the group's standard deviation (unbiased) + 1e-6.
    """

    std: bool = True

    def relative(self, scores: Tensor, group: Tensor, lengths: Tensor) -> Tensor:
        return pass_at_k_advantages(scores, group, std=self.std)


@dataclass(kw_only=True)
class Returns(Credit):
    """Rewards from a token on, whitened over all tokens of the iteration: REINFORCE++ (arXiv 2501.03262).

    Args:
        gamma: Discount per token.
    """

    siblings = False
    gamma: float = 1.0

    def __post_init__(self) -> None:
        _check_shares(gamma=self.gamma)

    def __call__(
        self,
        rewards: Tensor,
        group: Tensor,
        mask: Tensor,
        *,
        has_reward: Tensor,
        total: Reduce,
        trajectory: Tensor | None = None,
        everywhere: Everywhere = here,
    ) -> Tensor:
        refuse_trajectories(trajectory, type(self).__name__)
        return whiten(rewards_to_go(rewards, mask, gamma=self.gamma), mask, total=total)


@dataclass(kw_only=True)
class ReturnsBaseline(GroupCredit):
    """Reward - mean of the group, whitened over all tokens of the iteration: REINFORCE++ with a baseline (arXiv 2501.03262)."""

    def __call__(
        self,
        rewards: Tensor,
        group: Tensor,
        mask: Tensor,
        *,
        has_reward: Tensor,
        total: Reduce,
        trajectory: Tensor | None = None,
        everywhere: Everywhere = here,
    ) -> Tensor:
        lead = super().__call__(rewards, group, mask, has_reward=has_reward, total=total, trajectory=trajectory, everywhere=everywhere)
        return whiten(lead, mask, total=total)

    def relative(self, scores: Tensor, group: Tensor, lengths: Tensor) -> Tensor:
        return group_advantages(scores, group, std="none")


@dataclass(kw_only=True)
class GAE:
    """Generalized advantage estimation with the values of a critic (arXiv 1506.02438).

    Args:
        gamma: Discount per token.
        lam: 1 looks at all that follows, 0 at the critic's next value.
        whiten: Advantages to mean 0 and standard deviation 1 over all tokens of an iteration.
    """

    gamma: float = 1.0
    lam: float = 1.0
    whiten: bool = True

    def __post_init__(self) -> None:
        _check_shares(gamma=self.gamma, lam=self.lam)

    def __call__(
        self, rewards: Float[Tensor, "B S"], values: Float[Tensor, "B S"], mask: Bool[Tensor, "B S"], *, total: Reduce
    ) -> tuple[Float[Tensor, "B S"], Float[Tensor, "B S"]]:
        """Advantages, and the returns that the critic learns; 0 where the mask is False."""
        advantages, returns = gae(rewards, values, mask, gamma=self.gamma, lam=self.lam)
        return whiten(advantages, mask, total=total) if self.whiten else advantages, returns


@dataclass(frozen=True, kw_only=True)
class LengthPenalty:
    """A reward falls linearly within the last tokens before `sampling.max_new_tokens` (DAPO, arXiv 2503.14476, eq. 13).

    Args:
        buffer: Tokens within which it falls; 0 = off.
        factor: How much lower the reward of an answer is that reaches the limit; default: 1. It takes a buffer.
    """

    buffer: int = 0
    factor: float | None = None

    def __post_init__(self) -> None:
        if self.factor is not None and not self.buffer:
            raise ConfigError(
                f"model.length_penalty.factor={self.factor} does nothing, as model.length_penalty.buffer is 0: set it to the tokens before "
                "the longest answer within which the reward falls (DAPO: a fifth of model.answers.sampling.max_new_tokens)"
            )

    def check(self, limit: int) -> None:
        """Raise ConfigError for a buffer longer than the longest answer."""
        if not 0 <= self.buffer <= limit:
            raise ConfigError(f"model.length_penalty.buffer={self.buffer} must be in 0..{limit}, the longest answer")

    def __call__(self, lengths: Int[Tensor, "B"], *, limit: int) -> Float[Tensor, "B"] | float:
        """The penalty, at most 0, of answers of these lengths."""
        factor = 1.0 if self.factor is None else self.factor
        return overlong_penalty(lengths, max_length=limit, buffer=self.buffer, factor=factor) if self.buffer else 0.0


def refuse_trajectories(trajectory: Tensor | None, rule: str) -> None:
    """Raise ConfigError for rules that follow rewards from token to token within a row, where rows are turns of longer trajectories."""
    if trajectory is not None:
        raise ConfigError(
            f"model.credit={rule} follows rewards from token to token of one row, and the rows of this run are turns of episodes: use a "
            "rule that compares whole episodes, such as lit_rl.credit.rules.Group"
        )


def _check_shares(**shares: float) -> None:
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ConfigError(f"model.credit.{name}={share} must be in [0, 1]; 1 is usual for language models")
