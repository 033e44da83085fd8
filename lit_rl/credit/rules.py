"""How rewards become advantages of tokens, as one block of a run's YAML."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lit_rl.credit.groups import (
    group_advantages,
    group_statistics,
    leave_one_out,
)
from lit_rl.credit.tokens import (
    Reduce,
    gae,
    length_weighted_advantages,
    pass_at_k_advantages,
    rewards_to_go,
    spread,
    whiten,
)
from lit_rl.credit.trajectories import NO_COLUMNS, Columns, Episodes, Everywhere, here, one_vote
from lit_rl.errors import ConfigError


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
        columns: Columns = NO_COLUMNS,
        everywhere: Everywhere = here,
    ) -> Float[Tensor, "B S"]:
        """Advantages, 0 where the mask is False.

        rewards: float64, of each token; a trajectory of several rows has its score once, in `lit_rl.credit.trajectories.closing_rows`.
        has_reward: rows that have a reward. columns: of the rows, such as `trajectory`, the ids of the trajectories that rows belong to
        (without it each row is one), see `lit_rl.types.TokenRollout`.
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
        columns: Columns = NO_COLUMNS,
        everywhere: Everywhere = here,
    ) -> Tensor:
        scores = torch.where(has_reward, rewards.sum(1), torch.nan)
        known = (scores, group, mask.sum(1), *([columns["trajectory"]] if "trajectory" in columns else []))
        return spread(everywhere(partial(one_vote, self.relative), *known), mask)

    @abstractmethod
    def relative(self, scores: Float[Tensor, "B"], group: Int[Tensor, "B"], lengths: Int[Tensor, "B"]) -> Float[Tensor, "B"]:
        """The advantage relative to its group of an answer, or of a trajectory; 0 for scores that are NaN. Of all processes."""


@dataclass(kw_only=True)
class Group(GroupCredit):
    """Reward - mean of the group: GRPO (arXiv 2402.03300).

    Args:
        std: Divide by the group's standard deviation (unbiased) + 1e-6; False: Dr. GRPO (arXiv 2503.20783).
        min_std: A group whose rewards have a smaller standard deviation teaches nothing: its advantages are 0.
    """

    std: bool = True
    min_std: float = 0.0

    def __post_init__(self) -> None:
        if self.min_std < 0:
            raise ConfigError(f"model.credit.min_std={self.min_std} must not be negative; 0.05 leaves out groups that hardly differ")

    def relative(self, scores: Tensor, group: Tensor, lengths: Tensor) -> Tensor:
        lead = group_advantages(scores, group, std="group" if self.std else "none", ddof=1, eps=1e-6)
        return lead.where(group_statistics(scores, group, ddof=1).std >= self.min_std, 0.0) if self.min_std else lead


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
        columns: Columns = NO_COLUMNS,
        everywhere: Everywhere = here,
    ) -> Tensor:
        episodes = Episodes(group, columns.get("trajectory"))
        returns = episodes.as_rows(rewards_to_go(episodes.joined(rewards), episodes.joined(mask), gamma=self.gamma))
        return whiten(returns, mask, total=total)


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
        columns: Columns = NO_COLUMNS,
        everywhere: Everywhere = here,
    ) -> Tensor:
        lead = super().__call__(rewards, group, mask, has_reward=has_reward, total=total, columns=columns, everywhere=everywhere)
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
        self,
        rewards: Float[Tensor, "B S"],
        values: Float[Tensor, "B S"],
        mask: Bool[Tensor, "B S"],
        *,
        total: Reduce,
        episodes: Episodes | None = None,
    ) -> tuple[Float[Tensor, "B S"], Float[Tensor, "B S"]]:
        """Advantages, and the returns that the critic learns; 0 where the mask is False. episodes: Rows that follow each other."""
        if episodes is None:
            advantages, returns = gae(rewards, values, mask, gamma=self.gamma, lam=self.lam)
        else:
            joined = gae(*map(episodes.joined, (rewards, values, mask)), gamma=self.gamma, lam=self.lam)
            advantages, returns = map(episodes.as_rows, joined)
        return whiten(advantages, mask, total=total) if self.whiten else advantages, returns


def _check_shares(**shares: float) -> None:
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ConfigError(f"model.credit.{name}={share} must be in [0, 1]; 1 is usual for language models")
