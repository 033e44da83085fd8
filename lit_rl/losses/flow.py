"""Losses on what a flow model predicts: distance to a reference, flow matching. One number per sample, averaged over latent elements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lit_rl.errors import ConfigError

KLKind = Literal["x_diffusion", "x_noise_std", "x", "v", "v_diffusion", "v_noise_std"]
"""The denominator of `gaussian_kl`, and the quantity that it compares: predicted next samples (x) or velocities (v)."""


def gaussian_kl(
    new: Float[Tensor, "B *D"],
    ref: Float[Tensor, "B *D"],
    *,
    kind: KLKind,
    diffusion: Float[Tensor, "B"] | None = None,
    noise_std: Float[Tensor, "B"] | None = None,
) -> Float[Tensor, "B"]:
    """mean_D (new - ref)^2 / c, with c as each project has it. new, ref: step means for x kinds, velocities for v kinds.

    | kind        | c                   | from                                                                            |
    | x_diffusion | 2 g^2               | Flow-GRPO; lacks the step's -dt, so kl_coef 0.04 there is not 0.04 of a true KL |
    | x_noise_std | 2 noise_std^2       | the KL of the two Gaussians; GenRL                                              |
    | x           | 1                   | Flow-Factory x-based (kl_coef ~ 1e-2), GenRL's CPS                              |
    | v           | 1                   | Flow-Factory v-based (kl_coef ~ 1e-3), DiffusionNFT (1e-4), AWM                 |
    | v_diffusion | 2 g^2 + 1e-7        | DeepGen-RL (kl_coef 5e-7) with flow_sde                                         |
    | v_noise_std | 2 noise_std^2 + 1e-7 | DeepGen-RL with cps, whose step has no g                                       |

    Rows whose divisor is 0 (no noise, no action) give 0. The gradient flows to `new`; compute `ref` without one.
    """
    square = (new - ref).pow(2).flatten(1).mean(1)
    if kind in ("x", "v"):
        return square
    name, scale = ("noise_std", noise_std) if kind.endswith("noise_std") else ("diffusion", diffusion)
    if scale is None:
        raise ValueError(f"kind {kind!r} divides by the step's {name}: pass {name}=")
    if kind.startswith("v_"):
        return square / (2 * scale**2 + 1e-7)
    noisy = scale > 0
    return torch.where(noisy, square / (2 * torch.where(noisy, scale, 1.0) ** 2), 0.0)


def flow_matching_loss(v: Float[Tensor, "B *D"], x0: Float[Tensor, "B *D"], noise: Float[Tensor, "B *D"]) -> Float[Tensor, "B"]:
    """mean_D (v - (noise - x0))^2 (arXiv 2210.02747), for v predicted at x = (1 - t) x0 + t noise."""
    return (v - (noise - x0)).pow(2).flatten(1).mean(1)


@dataclass(frozen=True, kw_only=True)
class FlowKL:
    """Divergence from the reference as a term of a flow method's loss.

    Args:
        coef: Its weight; 0 spends no forward on the reference.
        kind: The published expression that it multiplies, see `gaussian_kl`.
    """

    coef: float = 0.0
    kind: KLKind = "x_diffusion"

    def __post_init__(self) -> None:
        if self.coef < 0:
            raise ConfigError(f"model.kl.coef={self.coef} must not be negative; 0 turns the reference off")

    @property
    def of_velocities(self) -> bool:
        """The divergence compares velocities; else means of steps."""
        return self.kind.startswith("v")


@dataclass(frozen=True, kw_only=True)
class VelocityKL:
    """mean (v - v_ref)^2, the divergence from the reference as a term of the loss of DiffusionNFT and AWM.

    Args:
        coef: Its weight; 0 spends no forward on the reference.
    """

    coef: float = 1e-4

    def __post_init__(self) -> None:
        if self.coef < 0:
            raise ConfigError(f"model.kl.coef={self.coef} must not be negative; 0 turns the reference off")
