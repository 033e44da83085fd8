"""Corrections where another policy sampled than the one that trains: importance weights, rejection, measures of the mismatch.

`logprobs` are the trainer's (of the weights that sampled, or the proximal ones), `rollout_logprobs` what the sampler reported.
l = logprobs - rollout_logprobs. Everything here is data: detached, and to be computed once per step. A log-ratio that is not finite
(the sampler did not say) counts as 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lit_rl.losses.masked import masked, masked_mean, row_mean
from lit_rl.losses.policy_gradient import LOG_RATIO_LIMIT

Level = Literal["token", "sequence", "geometric"]
"""Whose ratio: the token's; the row's product of ratios; the row's geometric mean."""

Divergence = Literal["ratio", "k1", "k2", "k3", "k3_reverse"]
"""exp(l); l; l^2 / 2; exp(l) - 1 - l (of the sampler's KL to the trainer); exp(-l) - 1 + l (the other way round, AReaL)."""


def log_ratio(logprobs: Float[Tensor, "B S"], rollout_logprobs: Float[Tensor, "B S"], mask: Bool[Tensor, "B S"]) -> Float[Tensor, "B S"]:
    """l in [-20, 20], 0 where the mask is False or either log-probability is not finite."""
    difference = (logprobs - rollout_logprobs).detach()
    return torch.where(mask & difference.isfinite(), difference, 0.0).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def importance_weights(
    logprobs: Float[Tensor, "B S"],
    rollout_logprobs: Float[Tensor, "B S"],
    mask: Bool[Tensor, "B S"],
    *,
    level: Level = "token",
    low: float | None = None,
    high: float | None = 2.0,
    outside: Literal["clamp", "zero"] = "clamp",
) -> Float[Tensor, "B S"]:
    """Truncated importance sampling: exp(l) of each token (or row) within [low, high], 0 where the mask is False.

    | who                | level              | low, high    | outside |      | who                  | level    | low, high | outside |
    | verl               | token or sequence  | null, 2      | clamp   |      | TRL sequence_mask    | sequence | null, 3   | zero    |
    | OpenRLHF TIS       | token              | 0.5, 5       | clamp   |      | IcePop               | token    | 0.5, 5    | zero    |

    level sequence multiplies the ratios of the whole row: for long responses that is soon far outside any bound.
    """
    ratios = log_ratio(logprobs, rollout_logprobs, mask)
    if level == "sequence":
        ratios = ratios.sum(1, keepdim=True).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).expand_as(mask)
    elif level == "geometric":
        ratios = row_mean(ratios, mask)[:, None].expand_as(mask)
    weights = masked(ratios.exp(), mask)
    if outside == "zero":
        weights = torch.where((weights >= (low or 0.0)) & (weights <= (torch.inf if high is None else high)), weights, 0.0)
    else:
        weights = masked(weights.clamp(low or 0.0, high), mask)
    return weights


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """Tokens (or answers) on which sampler and trainer disagree too much leave the loss; what the others weigh stays.

    Args:
        upper: Largest divergence that is kept.
        lower: Smallest one, e.g. of the ratio; None = none.
        metric: See `Divergence`.
        over: The token's own divergence, or the sum, the mean or the largest one of the answer. A ratio is aggregated in log space.
    """

    upper: float
    lower: float | None = None
    metric: Divergence = "ratio"
    over: Literal["token", "sum", "mean", "max"] = "token"

    def __call__(self, logprobs: Float[Tensor, "B S"], behaviour: Float[Tensor, "B S"], mask: Bool[Tensor, "B S"]) -> Bool[Tensor, "B S"]:
        """`within_bounds`."""
        return within_bounds(logprobs, behaviour, mask, metric=self.metric, over=self.over, lower=self.lower, upper=self.upper)


@dataclass(frozen=True, kw_only=True)
class Correction:
    """Truncated importance sampling: the loss of a token times trainer's / sampler's probability, at most `high` (arXiv 2501.03262).

    For samplers that compute a little differently than the trainer, such as an inference server.

    Args:
        level: Whose ratio: the token's, the product of the row, or its geometric mean.
        low: The ratio's lower bound; None = none.
        high: Its upper bound.
        outside: Treatment of ratios beyond them: `clamp`, or `zero`, which takes the token (or row) out of the loss.
        reject: Leave tokens (or answers) out of the loss by another measure than the ratio; default: none.
    """

    level: Level = "token"
    low: float | None = None
    high: float = 2.0
    outside: Literal["clamp", "zero"] = "clamp"
    reject: Rejection | None = None

    def __call__(
        self, logprobs: Float[Tensor, "B S"], behaviour: Float[Tensor, "B S"] | None, mask: Bool[Tensor, "B S"]
    ) -> Float[Tensor, "B S"] | float:
        """`importance_weights`; 1 where the sampler's log-probabilities are the trainer's."""
        if behaviour is None:
            return 1.0
        weights = importance_weights(logprobs, behaviour, mask, level=self.level, low=self.low, high=self.high, outside=self.outside)
        return weights if self.reject is None else weights * self.reject(logprobs, behaviour, mask)


def within_bounds(
    logprobs: Float[Tensor, "B S"],
    rollout_logprobs: Float[Tensor, "B S"],
    mask: Bool[Tensor, "B S"],
    *,
    metric: Divergence,
    over: Literal["token", "sum", "mean", "max"] = "token",
    lower: float | None = None,
    upper: float,
) -> Bool[Tensor, "B S"]:
    """Masked tokens whose divergence (or whose row's sum, mean or largest one) lies in [lower, upper]: the mask after rejection.

    The ratio is aggregated in log space (sum: the row's product; mean: its geometric mean). verl's k1 thresholds "lo_hi" are bounds of the
    *inverse* ratio: metric ratio with lower 1/hi and upper 1/lo. Several rules: AND the results. Denominators stay those of the full mask.
    """
    gap = log_ratio(logprobs, rollout_logprobs, mask)
    value = {"ratio": gap, "k1": gap, "k2": 0.5 * gap**2, "k3": gap.exp() - 1 - gap, "k3_reverse": (-gap).exp() - 1 + gap}[metric]
    if over == "sum":
        value = masked(value, mask).sum(1, keepdim=True)
    elif over == "mean":
        value = row_mean(value, mask)[:, None]
    elif over == "max":
        value = torch.where(mask, value, -torch.inf).amax(1, keepdim=True)
    if metric == "ratio":
        value = value.exp()
    kept = value <= upper
    if lower is not None:
        kept = kept & (value >= lower)
    return mask & kept


def sampler_kl(logprobs: Float[Tensor, "B S"], rollout_logprobs: Float[Tensor, "B S"], mask: Bool[Tensor, "B S"]) -> Float[Tensor, ""]:
    """mean(-l): the sampler's KL to the trainer. Above 1e-2 in absolute value: stale weights, another template or dtype."""
    return masked_mean(-log_ratio(logprobs, rollout_logprobs, mask), mask)
