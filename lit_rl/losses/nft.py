"""Losses of the forward process: a sample is noised afresh, and the policy is rewarded or punished for how well it predicts it."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

AdvantageMode = Literal["normal", "positive_only", "negative_only", "one_only", "binary"]
"""The part of an advantage A that is used: A itself; max(A, 0); min(A, 0); 1 where A > 0, else 0; its sign."""

MatchingWeight = Literal["uniform", "t", "t2", "huber", "ghuber"]
"""The weight of the squared error in `matching_logprob`, see there."""


class NFTLoss(NamedTuple):
    """One number per row."""

    policy: Float[Tensor, "B"]  # the loss
    positive: Float[Tensor, "B"]  # weighted error of the positive policy
    negative: Float[Tensor, "B"]  # and of the implicit negative one


def optimality(advantages: Float[Tensor, "B"], *, clip: float, mode: AdvantageMode = "normal") -> Float[Tensor, "B"]:
    """r = clamp(A / (2 clip) + 1/2, 0, 1): DiffusionNFT's probability that a sample is a good one (arXiv 2509.16117).

    A is clamped to [-clip, clip] (published: 5) and then changed by `mode`. With clip 5, one_only and binary give r in {0.4, 0.5, 0.6}.
    """
    a = advantages.clamp(-clip, clip)
    if mode == "positive_only":
        a = a.clamp(min=0)
    elif mode == "negative_only":
        a = a.clamp(max=0)
    elif mode == "one_only":
        a = (a > 0).to(a.dtype)
    elif mode == "binary":
        a = a.sign()
    return (a / (2 * clip) + 0.5).clamp(0, 1)


def nft_loss(
    new: Float[Tensor, "B *D"],
    old: Float[Tensor, "B *D"],
    *,
    x: Float[Tensor, "B *D"],
    x0: Float[Tensor, "B *D"],
    sigma: Float[Tensor, "B"],
    r: Float[Tensor, "B"],
    beta: float,
    scale: float,
) -> NFTLoss:
    """scale (r l+ + (1 - r) l-) / beta, l± = mean_D(e±^2) / max(mean_D |e±|, 1e-5), e± = x - sigma v± - x0.

    DiffusionNFT (arXiv 2509.16117). v+ = beta new + (1 - beta) old is the policy that good samples should come from,
    v- = (1 + beta) old - beta new the implicit one for bad samples. At new = old the gradient with respect to
    new is scale (2r - 1) 2 (-sigma) e / (w D), w the divisor: zero at advantage 0, whatever beta.

    Args:
        new, old: velocities at x = (1 - sigma) x0 + sigma noise. The gradient flows to `new` only.
        r: `optimality` of each row.
        beta: above 0; 1 published for GenEval, 0.1 for OCR and several rewards.
        scale: the clip of the advantages, which makes the gradient proportional to them.
    """
    if beta <= 0:
        raise ValueError(f"beta {beta} must be above 0; DiffusionNFT uses 0.1 ... 1")
    work = torch.promote_types(torch.promote_types(x.dtype, new.dtype), torch.float32)
    new, old, x, x0, sigma = new.to(work), old.detach().to(work), x.to(work), x0.to(work), sigma.to(work)
    positive = _weighted_error(beta * new + (1 - beta) * old, x, x0, sigma)
    negative = _weighted_error((1 + beta) * old - beta * new, x, x0, sigma)
    return NFTLoss(scale / beta * (r * positive + (1 - r) * negative), positive, negative)


def matching_logprob(
    v: Float[Tensor, "B *D"],
    x0: Float[Tensor, "B *D"],
    noise: Float[Tensor, "B *D"],
    *,
    sigma: Float[Tensor, "B"],
    weight: MatchingWeight = "ghuber",
    power: float = 0.25,
) -> Float[Tensor, "B"]:
    """-w(mean_D (v - (noise - x0))^2): what advantage-weighted matching takes for a log-probability (AWM, arXiv 2509.25050).

    uniform: m; t: m sigma; t2: m sigma^2; huber: (sqrt(m + 1e-10) - 1e-5) sigma; ghuber: ((m + 1e-10)^p - 1e-10^p) sigma / p, p = power.
    All five are Flow-Factory's.
    """
    m = (v - (noise - x0)).pow(2).flatten(1).mean(1)
    if weight == "uniform":
        return -m
    if weight in ("t", "t2"):
        return -m * (sigma if weight == "t" else sigma**2)
    p = 0.5 if weight == "huber" else power
    return -((m + 1e-10) ** p - 1e-10**p) * sigma / (1.0 if weight == "huber" else p)


def _weighted_error(v: Float[Tensor, "B *D"], x: Float[Tensor, "B *D"], x0: Float[Tensor, "B *D"], sigma: Float[Tensor, "B"]) -> Tensor:
    """mean_D(e^2) / max(mean_D |e|, 1e-5), e = x - sigma v - x0; no gradient through the divisor."""
    error = x - v * sigma.view(-1, *[1] * (x.ndim - 1)) - x0
    scale = error.detach().abs().flatten(1).mean(1).clamp(min=1e-5)
    return error.pow(2).flatten(1).mean(1) / scale
