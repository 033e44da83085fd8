"""Advantages of the turns of an episode: discounted returns, and GiGPO's comparison of turns that began in the same state."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lit_rl.credit.groups import Scale, group_advantages, group_statistics
from lit_rl.credit.rules import Credit
from lit_rl.credit.tokens import Reduce, spread
from lit_rl.credit.trajectories import NO_COLUMNS, Columns, Episodes, Everywhere, here, one_vote, trajectory_sums
from lit_rl.errors import ConfigError


def state_numbers(names: Sequence[str], group: Sequence[int], *, similarity: float | None = None) -> list[int]:
    """Int "B": equal for rows of a group whose states have the same name, numbered by first appearance.

    similarity: Names that are as similar as this (`difflib` ratio in [0, 1]) to the first of a number share it, as in GiGPO's code.
    """
    firsts: dict[int, dict[str, int]] = {}
    count, numbers = itertools.count(), []
    for name, among in zip(names, group, strict=True):
        known = firsts.setdefault(among, {})
        first = name
        if similarity is not None and name not in known:
            first = next((other for other in known if SequenceMatcher(None, name, other).ratio() >= similarity), name)
        if first not in known:
            known[first] = next(count)
        numbers.append(known[first])
    return numbers


def turn_returns(
    rewards: Float[Tensor, "B"], group: Int[Tensor, "B"], trajectory: Int[Tensor, "B"] | None, *, gamma: float
) -> Float[Tensor, "B"]:
    """G_t = r_t + gamma G_(t+1) over the turns of each trajectory, whose rows stand in order; NaN counts as 0."""
    episodes = Episodes(group, trajectory)
    joined = episodes.joined(rewards.nan_to_num()[:, None])
    for turn in range(joined.shape[1] - 2, -1, -1):
        joined[:, turn] += gamma * joined[:, turn + 1]
    return episodes.as_rows(joined)[:, 0]


def step_advantages(
    returns: Float[Tensor, "B"], group: Int[Tensor, "B"], state: Int[Tensor, "B"], *, std: Scale = "none", eps: float = 1e-6
) -> Float[Tensor, "B"]:
    """Returns relative to those of all turns of the group that began in the same state; 0 where there is one (arXiv 2505.10978, eq. 7)."""
    place = torch.stack([group, state.to(group)], 1).unique(dim=0, return_inverse=True)[1]
    return group_advantages(returns, place, std=std, ddof=1, eps=eps)


def gigpo_advantages(
    scores: Float[Tensor, "B"],
    returns: Float[Tensor, "B"],
    group: Int[Tensor, "B"],
    trajectory: Int[Tensor, "B"] | None,
    state: Int[Tensor, "B"],
    *,
    weight: float = 1.0,
    std: bool = False,
    eps: float = 1e-6,
    raw_alone: bool = False,
) -> Float[Tensor, "B"]:
    """A = A_episode + weight A_step: GiGPO (arXiv 2505.10978, eq. 8).

    A_episode compares the trajectories of a group by their scores, each once; A_step is `step_advantages` of the returns.

    Args:
        scores: Of its whole trajectory, equal on all of its rows; NaN where it has none.
        returns: `turn_returns` of each turn.
        state: Name of the state in which a turn began; names need to differ within a group only.
        std: Divide by the (unbiased) standard deviation + eps, of trajectories and of turns.
        raw_alone: The only trajectory of a group keeps its score as it is, as in the authors' code; else it gives 0.
    """
    scale: Scale = "group" if std else "none"

    def of_episodes(values: Tensor, among: Tensor, _: Tensor) -> Tensor:
        lead = group_advantages(values, among, std=scale, ddof=1, eps=eps)
        if not raw_alone:
            return lead
        alone = group_statistics(values, among).size == 1
        return torch.where(alone & ~values.isnan(), values / (1 + eps) if std else values, lead)

    first = _of_trajectories(scores, group, trajectory)
    ones = torch.ones_like(group)
    episode = one_vote(of_episodes, first, group, ones, trajectory)
    step = step_advantages(returns.where(~scores.isnan(), torch.nan), group, state, std=scale, eps=eps)
    return episode + weight * step


def _of_trajectories(scores: Tensor, group: Tensor, trajectory: Tensor | None) -> Tensor:
    """Scores so shared out among the rows of a trajectory that their sum is the score."""
    known = trajectory_sums((~scores.isnan()).to(scores.dtype), group, trajectory)
    return scores / known.clamp(min=1)


@dataclass(kw_only=True)
class TurnReturns(Credit):
    """Discounted returns of turns relative to the group: a turn long before the reward earns less than the last one.

    The baseline is the mean over the group's trajectories of their turns' mean return.

    Args:
        gamma: Discount per turn (AReaL's turn_discount).
        std: Divide by the standard deviation (unbiased) of the trajectories' mean returns + 1e-6.
        whole: Every turn gets the return of the first one, as AReaL's multi-turn workflow has it: a long way to the reward is worth less.
    """

    gamma: float = 0.95
    std: bool = True
    whole: bool = False

    def __post_init__(self) -> None:
        _check_gamma(self.gamma)

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
        return spread(everywhere(self.relative, scores, group, columns.get("trajectory", torch.arange(len(group)).to(group))), mask)

    def relative(self, scores: Float[Tensor, "B"], group: Int[Tensor, "B"], trajectory: Int[Tensor, "B"]) -> Float[Tensor, "B"]:
        """Advantages of turns; 0 where a turn or its group has no reward to compare."""
        returns = turn_returns(scores, group, trajectory, gamma=self.gamma)
        if self.whole:
            episodes = Episodes(group, trajectory)
            returns = episodes.joined(returns[:, None])[:, 0][episodes.rows[0]]
        known = ~scores.isnan()
        turns = trajectory_sums(known.to(returns.dtype), group, trajectory)
        shares = torch.where(known, returns / turns.clamp(min=1), torch.nan)

        def baseline(means: Tensor, among: Tensor, _: Tensor) -> Tensor:
            found = group_statistics(means, among, ddof=1)
            return torch.where(found.size > 1, found.mean, torch.nan)

        def deviation(means: Tensor, among: Tensor, _: Tensor) -> Tensor:
            return group_statistics(means, among, ddof=1).std

        ones = torch.ones_like(group)
        lead = returns - one_vote(baseline, shares, group, ones, trajectory)
        scale = one_vote(deviation, shares, group, ones, trajectory) + 1e-6 if self.std else torch.ones_like(lead)
        return torch.where(known, lead / scale, 0.0).nan_to_num(0.0)


@dataclass(kw_only=True)
class GiGPO(Credit):
    """GRPO's advantage of the episode, and beside it that of each turn among those that began in the same state (arXiv 2505.10978).

    States are named by the world; turns of different episodes of a group that look at the same screen are compared.

    Args:
        gamma: Discount per turn of the returns that turns are compared by.
        weight: Of the turns' advantage beside the episode's.
        std: Divide both by the standard deviation (unbiased) + 1e-6.
    """

    gamma: float = 0.95
    weight: float = 1.0
    std: bool = False

    def __post_init__(self) -> None:
        _check_gamma(self.gamma)

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
        if "state" not in columns:
            raise ConfigError(
                "model.credit=GiGPO compares turns that began in the same state, and the rows of this run name none: use it with agents "
                "(lit_rl.methods.agent_grpo.AgentGRPO), or a rule such as lit_rl.credit.rules.Group"
            )
        scores = torch.where(has_reward, rewards.sum(1), torch.nan)
        rows = (scores, group, columns["trajectory"], columns["state"])
        return spread(everywhere(self.relative, *rows), mask)

    def relative(self, scores: Tensor, group: Tensor, trajectory: Tensor, state: Tensor) -> Float[Tensor, "B"]:
        """Advantages of turns."""
        returns = turn_returns(scores, group, trajectory, gamma=self.gamma)
        whole = trajectory_sums(scores, group, trajectory)
        return gigpo_advantages(whole, returns, group, trajectory, state, weight=self.weight, std=self.std)


def _check_gamma(gamma: float) -> None:
    if not 0 <= gamma <= 1:
        raise ConfigError(f"model.credit.gamma={gamma} must be in [0, 1]; 0.95 is usual for turns")
