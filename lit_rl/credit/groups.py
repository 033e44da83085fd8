"""From rewards to advantages. Everything here takes the rewards of *all* ranks, gathered: only then is "batch" the whole batch.

NaN means "could not be scored": such a row is in no statistic and gets advantage 0. So does every row of a group that cannot say which
of its members was better: one with fewer than two scored members, or with equal rewards. Statistics are in float64, results in the dtype
of the rewards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Scale = Literal["group", "batch", "max_group", "none"]
"""Whose standard deviation divides: the row's own group, all rows, the group with the largest, nobody's."""

Rewards = Mapping[str, Float[Tensor, "B"]]
Weights = Mapping[str, float | Float[Tensor, "B"]]
"""One number per reward, or one per reward and row. Rewards that are not named, or have weight 0, do not count."""


def group_advantages(
    rewards: Float[Tensor, "B"],
    group: Int[Tensor, "B"],
    *,
    std: Scale = "batch",
    ddof: int = 0,
    eps: float = 1e-4,
    std_floor: float = 0.0,
    trim: float = 0.0,
) -> Float[Tensor, "B"]:
    """A_i = (r_i - mean of its group) / (max(std, std_floor) + eps): GRPO (arXiv 2402.03300, section 4.1.2). Groups may differ in size.

    | project        | std       | ddof | eps  | std_floor |        | project      | std       | ddof | eps  |
    | Flow-GRPO, NFT | batch     | 0    | 1e-4 | 0         |        | DanceGRPO    | group     | 1    | 1e-8 |
    | Flow-Factory   | batch     | 0    | 0    | 1e-6      |        | GenRL        | max_group | 0    | 1e-4 |

    Without groups, pass zeros as `group` (REINFORCE with a batch baseline). With std "none", A_i = r_i - mean (Dr. GRPO, arXiv 2503.20783).
    trim: share of each group, its lowest rewards, left out of the group's mean and std (MixGRPO).
    """
    values, index = rewards.double(), _index(group)
    valid = ~values.isnan()
    used = valid & ~_lowest(values, index, valid, trim)
    stats = _statistics(values, index, used, ddof=ddof)
    if std == "none":
        scale = torch.ones_like(values)
    else:
        batch = _statistics(values, torch.zeros_like(index), valid, ddof=ddof)
        deviation = {"group": stats.std, "batch": batch.std, "max_group": stats.std.amax().expand_as(values)}[std]
        scale = deviation.clamp(min=std_floor) + eps
    return torch.where(_informative(values, index, valid), (values - stats.mean) / scale, 0.0).to(rewards.dtype)


def total_reward(rewards: Rewards, weights: Weights) -> Float[Tensor, "B"]:
    """sum_k w_k r_k, NaN where any reward that counts is NaN. The weights are taken as they are, not normalised."""
    _check_names(rewards, weights)
    terms = [torch.where(w == 0, 0.0, rewards[name] * w) for name, w in _weight_rows(rewards, weights).items()]
    return torch.stack(terms).sum(0)


def per_reward_advantages(rewards: Rewards, group: Int[Tensor, "B"], *, weights: Weights, **options: Any) -> Float[Tensor, "B"]:
    """sum_k w_k A_k, A_k = `group_advantages` of reward k with `options`: GenRL's weighted advantages, MixGRPO's advantage aggregation.

    However large a reward's numbers are, its say is w_k; a reward that is constant in a group says nothing there. A score that is missing
    is missing for its reward only: the row is in the statistics of the rewards that it has, and its advantage is the sum over these.
    """
    _check_names(rewards, weights)
    result = torch.zeros_like(next(iter(rewards.values())))
    for name, weight in _weight_rows(rewards, weights).items():
        result = result + torch.where(weight == 0, 0.0, weight * group_advantages(rewards[name], group, **options))
    return result


def has_any_reward(rewards: Rewards, weights: Weights) -> Bool[Tensor, "B"]:
    """Rows that have one of the rewards that count for them, or for which none counts."""
    rows = _weight_rows(rewards, weights)
    counts = torch.stack([weight != 0 for weight in rows.values()])
    scored = torch.stack([~rewards[name].isnan() for name in rows])
    return (counts & scored).any(0) | ~counts.any(0)


def gdpo_advantages(
    rewards: Rewards,
    group: Int[Tensor, "B"],
    *,
    weights: Weights,
    ddof: int = 0,
    eps: float = 0.0,
    std_floor: float = 1e-6,
) -> Float[Tensor, "B"]:
    """S = sum_k w_k (r_k - mean of group) / std of group; A = (S - mean of batch) / std of batch: GDPO (arXiv 2601.05242).

    A row without any reward that counts is in neither statistic; one that lacks some has the sum over those that it has. The defaults are
    Flow-Factory's (ddof 0, floor 1e-6); DeepGen-RL has ddof=1, eps=1e-4, std_floor=0 and all weights 1.
    """
    options: dict[str, Any] = {"ddof": ddof, "eps": eps, "std_floor": std_floor}
    combined = per_reward_advantages({k: r.double() for k, r in rewards.items()}, group, weights=weights, std="group", **options)
    batch = _statistics(combined, torch.zeros_like(group), has_any_reward(rewards, weights), ddof=ddof)
    teaches = torch.stack([informative(rewards[k].double(), group) & (w != 0) for k, w in _weight_rows(rewards, weights).items()])
    result = torch.where(teaches.any(0), (combined - batch.mean) / (batch.std.clamp(min=std_floor) + eps), 0.0)
    return result.to(next(iter(rewards.values())).dtype)


def leave_one_out(rewards: Float[Tensor, "B"], group: Int[Tensor, "B"]) -> Float[Tensor, "B"]:
    """A_i = r_i - mean of the others in its group = n / (n - 1) (r_i - mean of the group): RLOO (arXiv 2402.14740)."""
    values, index = rewards.double(), _index(group)
    valid = ~values.isnan()
    stats = _statistics(values, index, valid, ddof=0)
    bessel = stats.size / (stats.size - 1).clamp(min=1)
    return torch.where(_informative(values, index, valid), bessel * (values - stats.mean), 0.0).to(rewards.dtype)


class GroupStatistics(NamedTuple):
    """Statistics of each row's group: mean and std of its scored rewards, and how many these are."""

    mean: Float[Tensor, "B"]
    std: Float[Tensor, "B"]
    size: Float[Tensor, "B"]


def group_statistics(rewards: Float[Tensor, "B"], group: Int[Tensor, "B"], *, ddof: int = 0) -> GroupStatistics:
    """Statistics of the scored rewards of each row's group; all 0 if it has none."""
    return _statistics(rewards.double(), _index(group), ~rewards.isnan(), ddof=ddof)


def informative(rewards: Float[Tensor, "B"], group: Int[Tensor, "B"]) -> Bool[Tensor, "B"]:
    """Scored rows in groups that hold two different scored rewards: those that get an advantage."""
    return _informative(rewards, _index(group), ~rewards.isnan())


def group_metrics(rewards: Float[Tensor, "B"], group: Int[Tensor, "B"]) -> dict[str, float]:
    """Metrics of an iteration: the rewards' mean, std and share of NaN; the groups' mean std and size, and share without a signal.

    Of trajectories with several rows give one of each, see `lit_rl.credit.trajectories.voters`.
    """
    valid, index = ~rewards.isnan(), _index(group)
    stats = group_statistics(rewards, group)
    one_per_group = _first(torch.ones_like(valid), index)
    batch = _statistics(rewards.double(), torch.zeros_like(index), valid, ddof=0)
    flat = ~_informative(rewards.double(), index, valid)
    return {
        "reward_mean": batch.mean[0].item(),
        "reward_std": batch.std[0].item(),
        "nan_ratio": 1 - valid.double().mean().item(),
        "group_std_mean": stats.std[one_per_group].mean().item(),
        "group_size_mean": len(rewards) / one_per_group.sum().item(),
        "zero_std_ratio": flat[one_per_group].double().mean().item(),
    }


class PromptTracker:
    """A = (r - mean) / (std + eps) against *everything* a prompt has earned so far, not only this iteration's group.

    For small groups (or groups of one) of prompts that come again. Keys are whatever names the prompt across iterations, e.g. its text.
    std "batch" divides by this batch's std instead.
    """

    def __init__(self, *, std: Literal["prompt", "batch"] = "prompt", eps: float = 1e-4) -> None:
        self.std, self.eps = std, eps
        self.history: dict[str, list[float]] = {}

    def update(self, keys: Sequence[str], rewards: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
        """Take in the rewards of all ranks, in the same order on every rank; returns their advantages. NaN is not remembered."""
        for key, reward in zip(keys, rewards.tolist(), strict=True):
            if reward == reward:  # not NaN
                self.history.setdefault(key, []).append(reward)
        values = rewards.double()
        tensors = {key: torch.tensor(self.history.get(key, [0.0]), dtype=torch.float64) for key in set(keys)}
        of_row = [tensors[key] for key in keys]
        mean = torch.stack([p.mean() for p in of_row]).to(values)
        deviation = torch.stack([p.std(correction=0) for p in of_row]).to(values)
        flat = torch.tensor([bool((p == p[0]).all()) for p in of_row], device=values.device)
        if self.std == "batch":
            deviation = values[~values.isnan()].std(correction=0).expand_as(values)
        return torch.where(flat | values.isnan(), 0.0, (values - mean) / (deviation + self.eps)).to(rewards.dtype)

    def state_dict(self) -> dict[str, dict[str, list[float]]]:
        """Plain types only, so that checkpoints load with `weights_only=True`."""
        return {"history": {key: list(values) for key, values in self.history.items()}}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
        self.history = {key: list(values) for key, values in state["history"].items()}


def _index(group: Int[Tensor, "B"]) -> Int[Tensor, "B"]:
    """Group ids -> 0, 1, 2, ..."""
    return torch.unique(group, return_inverse=True)[1]


def _group_sum(values: Float[Tensor, "B"], index: Int[Tensor, "B"]) -> Float[Tensor, "B"]:
    """Each row's group total."""
    return torch.zeros_like(values).index_add(0, index, values)[index]


def _statistics(values: Float[Tensor, "B"], index: Int[Tensor, "B"], used: Bool[Tensor, "B"], *, ddof: int) -> GroupStatistics:
    count = _group_sum(used.to(values.dtype), index)
    mean = _group_sum(torch.where(used, values, 0.0), index) / count.clamp(min=1)
    square = _group_sum(torch.where(used, values - mean, 0.0) ** 2, index)
    return GroupStatistics(mean, (square / (count - ddof).clamp(min=1)).sqrt(), count)


def _extremes(
    values: Float[Tensor, "B"], index: Int[Tensor, "B"], valid: Bool[Tensor, "B"]
) -> tuple[Float[Tensor, "B"], Float[Tensor, "B"]]:
    """Largest and smallest scored value of each row's group."""
    high = torch.full_like(values, -torch.inf).scatter_reduce(0, index, torch.where(valid, values, -torch.inf), "amax")
    low = torch.full_like(values, torch.inf).scatter_reduce(0, index, torch.where(valid, values, torch.inf), "amin")
    return high[index], low[index]


def _informative(values: Float[Tensor, "B"], index: Int[Tensor, "B"], valid: Bool[Tensor, "B"]) -> Bool[Tensor, "B"]:
    """Scored rows in groups that hold two different scored rewards."""
    high, low = _extremes(values, index, valid)
    return valid & (high > low)


def _lowest(values: Float[Tensor, "B"], index: Int[Tensor, "B"], valid: Bool[Tensor, "B"], share: float) -> Bool[Tensor, "B"]:
    """The int(n share) lowest scored values of each group of n, but never all of them."""
    count = _group_sum(valid.to(values.dtype), index)
    by_value = torch.where(valid, values, torch.inf).argsort(stable=True)
    order = by_value[index[by_value].argsort(stable=True)]
    rank = torch.empty_like(index)
    rank[order] = torch.arange(len(index), device=index.device)
    start = torch.full_like(index, len(index)).scatter_reduce(0, index, rank, "amin")[index]
    return valid & (rank - start < torch.minimum((count * share).floor(), count - 1))


def _first(chosen: Bool[Tensor, "B"], index: Int[Tensor, "B"]) -> Bool[Tensor, "B"]:
    """The first of each group's chosen rows."""
    row = torch.arange(len(index), device=index.device)
    first = torch.full_like(index, len(index)).scatter_reduce(0, index, torch.where(chosen, row, len(index)), "amin")
    return chosen & (first[index] == row)


def _weight_rows(rewards: Rewards, weights: Weights) -> dict[str, Float[Tensor, "B"]]:
    return {
        name: torch.as_tensor(w, dtype=rewards[name].dtype, device=rewards[name].device).expand_as(rewards[name])
        for name, w in weights.items()
    }


def _check_names(rewards: Rewards, weights: Weights) -> None:
    missing = sorted(set(weights) - set(rewards))
    if missing or not weights:
        raise ValueError(
            f"reward weights name {missing or 'nothing'}, but the rewards are {sorted(rewards)}; set reward_weights to some of these"
        )
