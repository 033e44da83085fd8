"""Policy-gradient losses of language models beside the clipped surrogate: per token, before weights. A is detached data everywhere.

GRPO, PPO, DAPO are `clipped_surrogate`; GSPO is `clipped_ratio_loss` of `sequence_log_ratio`; the rest is here.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lit_rl.losses.masked import masked, masked_mean, row_mean
from lit_rl.losses.policy_gradient import LOG_RATIO_LIMIT


def sequence_log_ratio(
    new: Float[Tensor, "B S"], logprobs: Float[Tensor, "B S"], mask: Bool[Tensor, "B S"], *, limit: float = 10.0
) -> Float[Tensor, "B S"]:
    """new - sg(new) + sg(s_i), s_i = the row's mean of new - logprobs, at most `limit`: GSPO's log-ratio (arXiv 2507.18071, eq. 14).

    Every token carries the value of its sequence and its own gradient, so that advantages may differ within a row.
    """
    mean = row_mean(new.detach() - logprobs, mask)[:, None]
    return masked(new - new.detach() + mean, mask).clamp(max=limit)


def reinforce_loss(new: Float[Tensor, "*S"], advantages: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """-A new: REINFORCE, GPG (arXiv 2504.02546)."""
    return -advantages * new


def cispo_loss(
    new: Float[Tensor, "*S"],
    logprobs: Float[Tensor, "*S"],
    advantages: Float[Tensor, "*S"],
    *,
    clip_high: float,
    clip_low: float | None = None,
) -> Float[Tensor, "*S"]:
    """-sg(clamp(r, 1 - clip_low, 1 + clip_high)) A new: CISPO (arXiv 2506.13585, eq. 4), where clipped tokens keep a gradient.

    clip_low None: no lower bound, as in the paper. TRL's epsilon_high is the bound itself: clip_high here is that minus 1.
    """
    low = None if clip_low is None else 1 - clip_low
    return -_ratio(new.detach() - logprobs).clamp(low, 1 + clip_high) * advantages * new


def sapo_loss(
    new: Float[Tensor, "*S"],
    logprobs: Float[Tensor, "*S"],
    advantages: Float[Tensor, "*S"],
    *,
    tau_pos: float = 1.0,
    tau_neg: float = 1.05,
) -> Float[Tensor, "*S"]:
    """-(4 / tau) sigmoid(tau (r - 1)) A, tau by the sign of A: SAPO's soft clipping (arXiv 2511.20347); at r = 1 REINFORCE's gradient."""
    tau = torch.where(advantages > 0, tau_pos, tau_neg).to(new.dtype)
    return -4 / tau * torch.sigmoid(tau * (_ratio(new - logprobs) - 1)) * advantages


def geo_mean_loss(
    new: Float[Tensor, "B S"],
    logprobs: Float[Tensor, "B S"],
    advantages: Float[Tensor, "B S"],
    mask: Bool[Tensor, "B S"],
    *,
    clip_low: float = 0.4,
    clip_high: float = 0.4,
) -> Float[Tensor, "B S"]:
    """-mean_t(A) exp(mean_t d'), d' = new - logprobs clipped on the side of A's sign, the same in all of a row: GMPO (arXiv 2507.20673).

    With weights seq-mean-token-mean the step's loss is the mean over rows. clip_low, clip_high bound the *log*-ratio.
    """
    log_ratio, sign = new - logprobs, advantages.sign()
    limited = sign * torch.minimum(sign * log_ratio, sign * log_ratio.clamp(-clip_low, clip_high))
    return (-row_mean(advantages, mask) * row_mean(limited, mask).exp())[:, None].expand_as(new)


def vespo_loss(
    new: Float[Tensor, "B S"],
    logprobs: Float[Tensor, "B S"],
    advantages: Float[Tensor, "B S"],
    mask: Bool[Tensor, "B S"],
    *,
    positive: tuple[float, float] = (2.0, 3.0),
    negative: tuple[float, float] = (3.0, 2.0),
    importance: Float[Tensor, "B S"] | None = None,
) -> Float[Tensor, "B S"]:
    """-sg(phi) A new, phi = exp(l + k w - l exp(w)), w = the row's summed log-ratio in [log 1e-8, 20]: VESPO, as TRL has it.

    positive, negative: (k, l) for A >= 0 and A < 0. importance: ratios of trainer to sampler, part of w.
    """
    log_ratio = (new.detach() - logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    if importance is not None:
        log_ratio = log_ratio + importance.clamp(min=1e-8).log()
    total = masked(log_ratio, mask).sum(1, keepdim=True).clamp(-18.420680743952367, LOG_RATIO_LIMIT)
    k, scale = (torch.where(advantages >= 0, p, n).to(new.dtype) for p, n in zip(positive, negative, strict=True))
    return -(scale + k * total - scale * total.exp()).exp() * advantages * new


def token_covariance(new: Float[Tensor, "B S"], advantages: Float[Tensor, "B S"], mask: Bool[Tensor, "B S"]) -> Float[Tensor, "B S"]:
    """(A - mean A) (new - mean new) per token: what drives entropy down (arXiv 2505.22617). Give it the whole step, not a micro-batch."""
    new = new.detach()
    return masked((advantages - masked_mean(advantages, mask)) * (new - masked_mean(new, mask)), mask)


def largest_covariance(covariance: Float[Tensor, "B S"], mask: Bool[Tensor, "B S"], *, share: float) -> Bool[Tensor, "B S"]:
    """The `share` of the masked tokens (at least one) with the largest covariance: those whose KL KL-Cov penalises."""
    count = int(mask.sum())
    chosen = torch.zeros_like(mask).flatten()
    if count and share > 0:
        chosen[torch.where(mask, covariance, -torch.inf).flatten().topk(max(1, int(count * share))).indices] = True
    return chosen.view_as(mask)


def clip_cov_choice(
    covariance: Float[Tensor, "B S"],
    mask: Bool[Tensor, "B S"],
    clipped: Bool[Tensor, "B S"],
    *,
    share: float = 2e-4,
    low: float = 1.0,
    high: float = 5.0,
    generator: torch.Generator | None = None,
) -> Bool[Tensor, "B S"]:
    """Tokens whose loss Clip-Cov takes away: a random `share` of the masked ones (at least one), drawn among low < covariance < high.

    arXiv 2505.22617, eq. 11. clipped: tokens that the surrogate's clip already holds (`is_clipped`); they are not drawn.
    """
    inside = (mask & ~clipped & (covariance > low) & (covariance < high)).flatten().nonzero()[:, 0]
    count = max(1, int(int(mask.sum()) * share))
    drawn = inside[torch.randperm(len(inside), generator=generator, device=inside.device)[:count]]
    chosen = torch.zeros_like(mask).flatten()
    chosen[drawn] = True
    return chosen.view_as(mask)


def kl_cov_loss(
    new: Float[Tensor, "*S"],
    logprobs: Float[Tensor, "*S"],
    advantages: Float[Tensor, "*S"],
    chosen: Bool[Tensor, "*S"],
    *,
    kl_coef: float = 1.0,
) -> Float[Tensor, "*S"]:
    """-A r, plus kl_coef abs(new - logprobs) where chosen: KL-Cov (arXiv 2505.22617, eq. 12)."""
    log_ratio = new - logprobs
    return -advantages * log_ratio.exp() + torch.where(chosen, kl_coef * log_ratio.abs(), 0.0)


def is_clipped(log_ratio: Float[Tensor, "*S"], advantages: Float[Tensor, "*S"], *, clip_low: float, clip_high: float) -> Bool[Tensor, "*S"]:
    """Where the clipped branch of the surrogate is the larger one: r above the range with A > 0, or below it with A < 0."""
    ratio = _ratio(log_ratio.detach())
    return -advantages * ratio.clamp(1 - clip_low, 1 + clip_high) > -advantages * ratio


def surrogate_metrics(
    log_ratio: Float[Tensor, "*S"],
    advantages: Float[Tensor, "*S"],
    mask: Bool[Tensor, "*S"],
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> dict[str, Float[Tensor, ""]]:
    """clip_fraction = _low (r < 1, A < 0) + _high (r > 1, A > 0): shares of the tokens whose gradient the clip takes.

    clip_fraction_dual: share of those at the dual clip, which are none of the above. ppo_kl = mean(-log_ratio).
    """
    log_ratio = log_ratio.detach().clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)

    def share(of: Tensor) -> Tensor:
        return masked_mean(of.to(log_ratio.dtype), mask)

    clipped = is_clipped(log_ratio, advantages, clip_low=clip_low, clip_high=clip_high)
    low, high = share(clipped & (log_ratio < 0)), share(clipped & (log_ratio > 0))
    metrics = {"clip_fraction": low + high, "clip_fraction_low": low, "clip_fraction_high": high, "ppo_kl": masked_mean(-log_ratio, mask)}
    if dual_clip is not None:
        loss = torch.maximum(-advantages * log_ratio.exp(), -advantages * log_ratio.exp().clamp(1 - clip_low, 1 + clip_high))
        metrics["clip_fraction_dual"] = share((advantages < 0) & (loss > -advantages * dual_clip))
    return metrics


def _ratio(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
