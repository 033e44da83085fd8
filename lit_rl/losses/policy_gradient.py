"""Policy-gradient losses, elementwise over actions. The caller multiplies with its weights and sums; nothing is averaged here."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

LOG_RATIO_LIMIT = 20.0
"""exp(20) is far outside every clip range; beyond it the gradient of an overflowing branch would be 0 * inf = NaN."""


def clipped_surrogate(
    new: Float[Tensor, "*S"],
    logprobs: Float[Tensor, "*S"],
    advantages: Float[Tensor, "*S"],
    *,
    clip_low: float,
    clip_high: float,
    adv_clip: float | None = None,
    dual_clip: float | None = None,
    ratio_cap: float | None = None,
) -> Float[Tensor, "*S"]:
    """max(-A r, -A clamp(r, 1 - clip_low, 1 + clip_high)), r = exp(new - logprobs): PPO (arXiv 1707.06347, eq. 7), GRPO.

    clip_low, clip_high: for denoising steps 1e-5 ... 1e-3, because their log-probabilities are means over latent elements; for tokens 0.2
    (DAPO: 0.2 and 0.28).
    adv_clip: A is clamped to [-adv_clip, adv_clip] first (Flow-GRPO: 5).
    dual_clip: c > 1; where A < 0 the loss is at most -A c (arXiv 1912.09729; verl: 3).
    ratio_cap: r in the unclipped branch is at most this (INTELLECT-2's two-sided clipping, TRL's delta).
    """
    return clipped_ratio_loss(
        new - logprobs, advantages, clip_low=clip_low, clip_high=clip_high, adv_clip=adv_clip, dual_clip=dual_clip, ratio_cap=ratio_cap
    )


def clipped_ratio_loss(
    log_ratio: Float[Tensor, "*S"],
    advantages: Float[Tensor, "*S"],
    *,
    clip_low: float,
    clip_high: float,
    adv_clip: float | None = None,
    dual_clip: float | None = None,
    ratio_cap: float | None = None,
) -> Float[Tensor, "*S"]:
    """`clipped_surrogate` for a log-ratio that is more than a difference of log-probabilities (GRPO-Guard, GSPO)."""
    if adv_clip is not None:
        advantages = advantages.clamp(-adv_clip, adv_clip)
    ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    free = ratio if ratio_cap is None else ratio.clamp(max=ratio_cap)
    loss = torch.maximum(-advantages * free, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high))
    if dual_clip is None:
        return loss
    if dual_clip <= 1:
        raise ValueError(
            f"dual_clip {dual_clip} must be above 1: it limits the loss of ratios far above 1; verl uses 3, null switches it off"
        )
    return torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)


def guard_logratio(
    new: Float[Tensor, "B"],
    logprobs: Float[Tensor, "B"],
    mean: Float[Tensor, "B *D"],
    old_mean: Float[Tensor, "B *D"],
    *,
    noise_std: Float[Tensor, "B"],
) -> Float[Tensor, "B"]:
    """s (new - logprobs) + mean_D (mu - mu_old)^2 / (2 s), s = noise_std: GRPO-Guard's log-ratio (arXiv 2510.22319).

    The Gaussian log-ratio has mean -(mu - mu_old)^2 / (2 s^2): clipping it around 1 is lopsided, and differently so at every step.
    Adding that mean back and multiplying with s makes one clip range (2e-6 ... 4e-6) fit all steps.
    Flow-GRPO's code averages the squared difference over the micro-batch too; here no row depends on others. Rows without noise give 0.
    """
    bias = (mean - old_mean).pow(2).flatten(1).mean(1)
    noisy = noise_std > 0
    return torch.where(noisy, noise_std * (new - logprobs) + bias / (2 * torch.where(noisy, noise_std, 1.0)), 0.0)


def policy_metrics(
    new: Float[Tensor, "*S"],
    logprobs: Float[Tensor, "*S"],
    *,
    clip_low: float,
    clip_high: float,
    weights: Float[Tensor, "*S"] | Bool[Tensor, "*S"] | None = None,
) -> dict[str, Float[Tensor, ""]]:
    """`ratio_metrics`, and the shares of the ratios outside of a clip range.

    clip_fraction_high: r > 1 + clip_high; clip_fraction_low: r < 1 - clip_low; clip_fraction: their sum.
    """
    weights = torch.ones_like(new) if weights is None else weights.to(new.dtype)
    seen, total = _log_ratios(new, logprobs, weights), _total(weights)
    ratio = _ratios(seen)
    high, low = (((out > clip).to(new.dtype) * weights).sum() / total for out, clip in ((ratio - 1, clip_high), (1 - ratio, clip_low)))
    shares = {"clip_fraction": high + low, "clip_fraction_high": high, "clip_fraction_low": low}
    return shares | _distances(seen, ratio, weights, total)


def ratio_metrics(new: Float[Tensor, "*S"], logprobs: Float[Tensor, "*S"], *, weights: Float[Tensor, "*S"]) -> dict[str, Float[Tensor, ""]]:
    """Distances between the policy and the one that acted: 0-d tensors on the device, averaged with `weights`.

    approx_kl = 0.5 mean (new - logprobs)^2; ratio_mean = mean r.
    ratio_max_dev = max |r - 1| over elements of non-zero weight: at the first update it is the rollout/training mismatch, ideally 0.
    """
    log_ratio = _log_ratios(new, logprobs, weights)
    return _distances(log_ratio, _ratios(log_ratio), weights, _total(weights))


def _distances(
    log_ratio: Float[Tensor, "*S"], ratio: Float[Tensor, "*S"], weights: Float[Tensor, "*S"], total: Float[Tensor, ""]
) -> dict[str, Float[Tensor, ""]]:
    return {
        "approx_kl": 0.5 * ((log_ratio**2 * weights).sum() / total),
        "ratio_mean": (ratio * weights).sum() / total,
        "ratio_max_dev": (ratio - 1).abs().amax(),
    }


def _log_ratios(new: Float[Tensor, "*S"], logprobs: Float[Tensor, "*S"], weights: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """new - logprobs without a gradient; 0 where the weight is 0."""
    return torch.where(weights != 0, new.detach() - logprobs.detach(), 0.0)


def _ratios(log_ratio: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def _total(weights: Float[Tensor, "*S"]) -> Float[Tensor, ""]:
    return weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)


def is_clipped(log_ratio: Float[Tensor, "*S"], advantages: Float[Tensor, "*S"], *, clip_low: float, clip_high: float) -> Bool[Tensor, "*S"]:
    """True where the clipped branch of the surrogate is the larger one: r above the range with A > 0, or below it with A < 0."""
    ratio = _ratios(log_ratio.detach())
    return -advantages * ratio.clamp(1 - clip_low, 1 + clip_high) > -advantages * ratio
