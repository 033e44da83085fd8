"""When the policy that sampled is not the one that trains: importance weights, rejection, measures of the mismatch.

`logprobs` are the trainer's (of the weights that sampled, or the proximal ones), `rollout_logprobs` what the sampler reported.
l = logprobs - rollout_logprobs. Everything here is data: detached, and to be computed once per step. A log-ratio that is not finite
(the sampler did not say) counts as 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lit_rl.losses.masked import COUNT_EPS, masked, masked_mean, row_mean
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
    normalize: bool = False,
) -> Float[Tensor, "B S"]:
    """Truncated importance sampling: exp(l) of each token (or row) within [low, high], 0 where the mask is False.

    | who                | level              | low, high    | outside |      | who                  | level    | low, high | outside |
    | verl               | token or sequence  | null, 2      | clamp   |      | TRL sequence_mask    | sequence | null, 3   | zero    |
    | OpenRLHF TIS       | token              | 0.5, 5       | clamp   |      | IcePop               | token    | 0.5, 5    | zero    |

    level sequence multiplies the ratios of the whole row: for long responses that is soon far outside any bound. normalize: divide by the
    mean weight (over tokens; for the row levels over rows).
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
    if normalize:
        weights = weights / (masked_mean(weights, mask) if level == "token" else masked_mean(row_mean(weights, mask), mask.any(1)))
    return weights


@dataclass(frozen=True, kw_only=True)
class Correction:
    """Truncated importance sampling: the loss of a token times trainer's / sampler's probability, at most `high` (arXiv 2501.03262).

    For samplers that compute a little differently than the trainer, such as an inference server.

    Args:
        level: Whose ratio: the token's, the product of the row, or its geometric mean.
        low: The ratio's lower bound; None = none.
        high: Its upper bound.
        outside: Treatment of ratios beyond them: `clamp`, or `zero`, which takes the token (or row) out of the loss.
    """

    level: Level = "token"
    low: float | None = None
    high: float = 2.0
    outside: Literal["clamp", "zero"] = "clamp"

    def __call__(
        self, logprobs: Float[Tensor, "B S"], behaviour: Float[Tensor, "B S"] | None, mask: Bool[Tensor, "B S"]
    ) -> Float[Tensor, "B S"] | float:
        """`importance_weights`; 1 where the sampler's log-probabilities are the trainer's."""
        if behaviour is None:
            return 1.0
        return importance_weights(logprobs, behaviour, mask, level=self.level, low=self.low, high=self.high, outside=self.outside)


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


def m2po_mask(
    logprobs: Float[Tensor, "B S"], rollout_logprobs: Float[Tensor, "B S"], mask: Bool[Tensor, "B S"], *, threshold: float = 0.04
) -> Bool[Tensor, "B S"]:
    """The mask without the fewest tokens of largest l^2 that leave a mean l^2 below the threshold; one token always stays: M2PO.

    arXiv 2510.01161. It looks at all tokens at once: give it the whole step.
    """
    square = log_ratio(logprobs, rollout_logprobs, mask)[mask].double() ** 2
    if not len(square):
        return mask
    rising, order = square.sort(stable=True)
    means = rising.cumsum(0) / torch.arange(1, len(rising) + 1, device=rising.device)
    keep = max(int((means < threshold).sum()), 1)
    kept = torch.zeros(len(square), dtype=torch.bool, device=mask.device)
    kept[order[:keep]] = True
    result = torch.zeros_like(mask)
    result[mask] = kept
    return result


def approximate_proximal(
    new: Float[Tensor, "B S"],
    rollout_logprobs: Float[Tensor, "B S"],
    versions: Int[Tensor, "B S"],
    *,
    version: int,
    space: Literal["log", "probability"] = "log",
) -> Float[Tensor, "B S"]:
    """Log-probabilities of the proximal policy (version - 1) between the sampler's and the new ones, without a forward: AReaL.

    Share of the new: alpha = clamp((version - 1 - v) / (version - v), 0, 1) for a token sampled at version v in [0, version), else 0.
    """
    new = new.detach()
    known = (versions >= 0) & (versions < version)
    gap = (version - versions).clamp(min=1).to(new.dtype)
    alpha = torch.where(known, ((gap - 1) / gap).clamp(0, 1), 0.0)
    if space == "log":
        return rollout_logprobs + alpha * (new - rollout_logprobs)
    return ((1 - alpha) * rollout_logprobs.exp() + alpha * new.exp()).clamp(min=1e-10).log()


def negative_rows_off_policy(
    new: Float[Tensor, "B S"],
    rollout_logprobs: Float[Tensor, "B S"],
    advantages: Float[Tensor, "B"],
    mask: Bool[Tensor, "B S"],
    *,
    threshold: float,
) -> Bool[Tensor, "B"]:
    """Rows to leave out: A < 0 and mean(rollout_logprobs - new) > threshold: DeepSeek-V3.2's off-policy sequence mask."""
    return (advantages < 0) & (row_mean(-log_ratio(new, rollout_logprobs, mask), mask) > threshold)


def high_entropy(entropy: Float[Tensor, "B S"], mask: Bool[Tensor, "B S"], *, share: float) -> Bool[Tensor, "B S"]:
    """The `share` of the masked tokens with the highest entropy (arXiv 2506.01939): all at 1. Give it the whole step."""
    if share >= 1 or not mask.any():
        return mask
    return mask & (entropy >= torch.quantile(entropy.detach()[mask], 1 - share))


def weight_metrics(
    logprobs: Float[Tensor, "B S"], rollout_logprobs: Float[Tensor, "B S"], mask: Bool[Tensor, "B S"], *, level: Level, high: float
) -> dict[str, Float[Tensor, ""]]:
    """What truncation at `high` does to the weights before it: mean, min, max, std, share above `high` and below 1 / high, and

    effective_share = 1 / mean((w / mean w)^2), the share of the samples that is left. std and effective_share are of weights in
    [1 / high, high]. Rows without a token do not count.
    """
    raw = importance_weights(logprobs, rollout_logprobs, mask, level=level, high=None)
    bounded = raw.clamp(1 / high, high)
    mean = masked_mean(bounded, mask)
    counted = mask if level == "token" else mask & (mask.cumsum(1) == 1)  # the first token stands for its row
    return {
        "mean": masked_mean(raw, mask),
        "max": torch.where(mask, raw, -torch.inf).amax(),
        "min": torch.where(mask, raw, torch.inf).amin(),
        "std": (masked_mean(bounded**2, mask) - mean**2).clamp(min=0).sqrt(),
        "share_high": masked_mean((raw > high).to(raw.dtype), counted),
        "share_low": masked_mean((raw < 1 / high).to(raw.dtype), counted),
        "effective_share": 1 / masked_mean((bounded / (mean + COUNT_EPS)) ** 2, mask).clamp(min=COUNT_EPS),
    }


def sampler_kl(logprobs: Float[Tensor, "B S"], rollout_logprobs: Float[Tensor, "B S"], mask: Bool[Tensor, "B S"]) -> Float[Tensor, ""]:
    """mean(-l): the sampler's KL to the trainer. Above 1e-2 in absolute value: stale weights, another template or dtype."""
    return masked_mean(-log_ratio(logprobs, rollout_logprobs, mask), mask)


def mismatch_metrics(
    logprobs: Float[Tensor, "B S"], rollout_logprobs: Float[Tensor, "B S"], mask: Bool[Tensor, "B S"]
) -> dict[str, Float[Tensor, ""]]:
    """How far sampler and trainer disagree about the same weights: an abs(kl) above 1e-2 means stale weights, another template or dtype.

    kl = mean(-l), k3 = mean(exp(l) - 1 - l), max_abs = largest abs(l), over tokens; ppl, log_ppl of both, means over rows; log_ppl_diff of
    the rows: mean, mean abs, max, min; ppl_ratio; chi2_token = mean(exp(2 l)) - 1; chi2_seq the same with the rows' sums of l.
    """
    gap = log_ratio(logprobs, rollout_logprobs, mask)
    rows = mask.any(1)
    mine, theirs = -row_mean(logprobs.detach(), mask), -row_mean(rollout_logprobs, mask)
    worse, total = mine - theirs, gap.sum(1).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return {
        "kl": sampler_kl(logprobs, rollout_logprobs, mask),
        "k3": masked_mean(gap.exp() - 1 - gap, mask),
        "max_abs": gap.abs().amax(),
        "trainer_ppl": masked_mean(mine.exp(), rows),
        "trainer_log_ppl": masked_mean(mine, rows),
        "rollout_ppl": masked_mean(theirs.exp(), rows),
        "rollout_log_ppl": masked_mean(theirs, rows),
        "log_ppl_diff": masked_mean(worse, rows),
        "log_ppl_abs_diff": masked_mean(worse.abs(), rows),
        "log_ppl_diff_max": torch.where(rows, worse, -torch.inf).amax(),
        "log_ppl_diff_min": torch.where(rows, worse, torch.inf).amin(),
        "ppl_ratio": masked_mean(worse.exp(), rows),
        "chi2_token": masked_mean((2 * gap).exp(), mask) - 1,
        "chi2_seq": masked_mean((2 * total).exp(), rows) - 1,
    }
