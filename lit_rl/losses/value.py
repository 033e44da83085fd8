"""Losses of a critic, elementwise."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lit_rl.losses.masked import masked_mean


def value_loss(
    values: Float[Tensor, "*S"], old_values: Float[Tensor, "*S"], returns: Float[Tensor, "*S"], *, clip: float | None
) -> Float[Tensor, "*S"]:
    """max((v - R)^2, (clamp(v, v_old - clip, v_old + clip) - R)^2) / 2 (PPO's value clipping). clip None: (v - R)^2 / 2.

    clip: 0.5 in verl and OpenRLHF, 0.2 in slime.
    """
    plain = (values - returns) ** 2
    if clip is None:
        return 0.5 * plain
    return 0.5 * torch.maximum(plain, (values.clamp(old_values - clip, old_values + clip) - returns) ** 2)


def clipped_share(
    values: Float[Tensor, "*S"], old_values: Float[Tensor, "*S"], returns: Float[Tensor, "*S"], mask: Bool[Tensor, "*S"], *, clip: float
) -> Float[Tensor, ""]:
    """Share of tokens whose clipped branch is the larger."""
    values = values.detach()
    clipped = (values.clamp(old_values - clip, old_values + clip) - returns) ** 2
    return masked_mean((clipped > (values - returns) ** 2).to(values.dtype), mask)
