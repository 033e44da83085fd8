"""From rewards to advantages of single tokens. Like `lit_rl.credit.groups`, these take what all ranks have, gathered.

The mask is True where the policy chose; it may have holes (what tools said) and rows without any token. Rewards and values under holes do
not count, and time does not pass there: the token before a hole is followed by the token behind it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lit_rl.credit.groups import group_statistics, informative
from lit_rl.losses.masked import COUNT_EPS, masked

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all processes, element by element."""


def whiten(x: Float[Tensor, "B S"], mask: Bool[Tensor, "B S"], *, total: Reduce) -> Float[Tensor, "B S"]:
    """(x - mean) / std over the masked tokens of all processes, 0 elsewhere."""
    kept, count = x.double().where(mask, 0.0), mask.sum().double()
    above, n = total(torch.stack([kept.sum(), count]))
    centred = (kept - above / n.clamp(min=1)).where(mask, 0.0)
    square = total(centred.pow(2).sum())
    return centred * torch.rsqrt(square / (n - 1).clamp(min=1) + 1e-8)


def place_scores(scores: Float[Tensor, "B"], mask: Bool[Tensor, "B S"]) -> Float[Tensor, "B S"]:
    """Each row's score on the last token that the policy chose: on a tool's token behind it every estimator would lose it."""
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    return torch.where(last, scores[:, None], 0.0)


def token_rewards(
    scores: Float[Tensor, "B"], mask: Bool[Tensor, "B S"], *, kl: Float[Tensor, "B S"] | None = None, kl_coef: float = 0.0
) -> Float[Tensor, "B S"]:
    """The score on the last token, minus kl_coef kl on every token (arXiv 2203.02155, eq. 2).

    kl: `kl_estimate` of the log-probabilities before the update against the reference; k1 is unbiased here.
    """
    rewards = place_scores(scores, mask)
    if kl_coef == 0:
        return rewards
    if kl is None:
        raise ValueError(f"a KL penalty of {kl_coef} in the reward needs a reference policy: add one, or set the coefficient to 0")
    return rewards - kl_coef * masked(kl.to(rewards.dtype), mask)


def spread(advantages: Float[Tensor, "B"], mask: Bool[Tensor, "B S"]) -> Float[Tensor, "B S"]:
    """The row's advantage on each of its tokens."""
    return torch.where(mask, advantages[:, None], 0.0)


def gae(
    rewards: Float[Tensor, "B S"], values: Float[Tensor, "B S"], mask: Bool[Tensor, "B S"], *, gamma: float = 1.0, lam: float = 1.0
) -> tuple[Float[Tensor, "B S"], Float[Tensor, "B S"]]:
    """Generalized advantage estimation (arXiv 1506.02438): (advantages, returns), 0 where the mask is False; then `whiten` them.

    A_t = delta_t + gamma lam A_next, delta_t = r_t + gamma V_next - V_t, next being the next masked token; nothing after the last one, so
    that a truncated response counts as finished. returns = A + V are what the critic learns.
    """
    rewards, values = masked(rewards, mask), masked(values, mask)
    advantage = next_value = torch.zeros_like(rewards[:, 0])
    columns = []
    for t in range(rewards.shape[1] - 1, -1, -1):
        here = mask[:, t]
        step = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * advantage
        advantage = torch.where(here, step, advantage)
        next_value = torch.where(here, values[:, t], next_value)
        columns.append(advantage)
    advantages = masked(torch.stack(columns[::-1], 1), mask) if columns else rewards
    return advantages, advantages + values


def rewards_to_go(rewards: Float[Tensor, "B S"], mask: Bool[Tensor, "B S"], *, gamma: float = 1.0) -> Float[Tensor, "B S"]:
    """G_t = r_t + gamma G_next: REINFORCE++ whitens these, ReMax subtracts the greedy answer's score; 0 where the mask is False."""
    rewards = masked(rewards, mask)
    total = torch.zeros_like(rewards[:, 0])
    columns = []
    for t in range(rewards.shape[1] - 1, -1, -1):
        here = mask[:, t]
        total = torch.where(here, rewards[:, t] + gamma * total, total)
        columns.append(total)
    return masked(torch.stack(columns[::-1], 1), mask) if columns else rewards


def pass_at_k_advantages(scores: Float[Tensor, "B"], group: Int[Tensor, "B"], *, std: bool = True, eps: float = 1e-6) -> Float[Tensor, "B"]:
    """Best minus second best [/ (std + eps)] for the best row of each group, 0 for the others: the gain of max over k samples.

    arXiv 2503.19595. Groups of one give 0; upstream raises. NaN cannot be the best.
    """
    result = torch.zeros_like(scores)
    deviation = group_statistics(scores, group, ddof=1).std
    for name in group.unique():
        rows = ((group == name) & ~scores.isnan()).nonzero()[:, 0]
        if len(rows) < 2:
            continue
        best = scores[rows].topk(2)
        row = rows[best.indices[0]]
        gain = best.values[0] - best.values[1]
        result[row] = gain / (deviation[row].to(gain.dtype) + eps) if std else gain
    return result


def win_rates(scores: Float[Tensor, "B"], group: Int[Tensor, "B"]) -> Float[Tensor, "B"]:
    """Mean over the others in its group of sigmoid(s_i - s_j), the chance to be preferred to one of them (Bradley-Terry).

    0.5 without another; NaN stays NaN and is nobody's opponent. Unlike the scores, the rates do not care how far ahead a winner is.
    """
    result = torch.where(scores.isnan(), torch.nan, torch.full_like(scores, 0.5))
    for name in group.unique():
        rows = ((group == name) & ~scores.isnan()).nonzero()[:, 0]
        if len(rows) > 1:
            chances = (scores[rows, None] - scores[None, rows]).double().sigmoid()
            result[rows] = ((chances.sum(1) - 0.5) / (len(rows) - 1)).to(scores.dtype)
    return result


def length_weighted_advantages(scores: Float[Tensor, "B"], lengths: Int[Tensor, "B"], group: Int[Tensor, "B"]) -> Float[Tensor, "B"]:
    """A_i = s_i - sum_j len_j s_j / sum_j len_j over the group: OPO (arXiv 2505.23585), optimal if gradients' squares grow with length."""
    known = ~scores.isnan()
    counted = torch.where(known, lengths.double(), torch.nan)
    weighted = group_statistics(counted * scores.double(), group)
    baseline = weighted.mean / group_statistics(counted, group).mean.clamp(min=COUNT_EPS)
    return torch.where(known & (weighted.size > 1), scores - baseline, 0.0).to(scores.dtype)


def overlong_penalty(lengths: Int[Tensor, "B"], *, max_length: int, buffer: int, factor: float = 1.0) -> Float[Tensor, "B"]:
    """-factor (length - (max_length - buffer)) / buffer, at most 0: DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13).

    lengths: tokens of the response. max_length: the longest response allowed, *not* the padded length.
    """
    if buffer <= 0:
        raise ValueError(f"overlong buffer {buffer} must be above 0; DAPO uses a fifth of the response length, 4096 of 20480")
    return -factor * (lengths - (max_length - buffer)).clamp(min=0) / buffer


def groups_that_teach(metric: Float[Tensor, "B"], group: Int[Tensor, "B"]) -> Bool[Tensor, "B"]:
    """Rows whose group has different values of the metric, or is a group of one: DAPO's dynamic sampling keeps these.

    Of trajectories with several rows give one of each, see `lit_rl.credit.trajectories.voters`.
    """
    return informative(metric, group) | (~metric.isnan() & (group_statistics(metric, group).size == 1))
