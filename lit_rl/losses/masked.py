"""Statistics over the positions that count. What stands at the others, NaN included, never matters; no positions give 0, never NaN."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

COUNT_EPS = 1e-8
"""Added to every count that divides, as verl does: 0 / 1e-8 is 0, and in float32 a count is unchanged by it."""


def masked(x: Float[Tensor, "*S"], mask: Bool[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """x where the mask is True, 0 elsewhere: 0 * NaN would be NaN, and so would its gradient."""
    return torch.where(mask, x, 0.0)


def finite_rows(x: Float[Tensor, "B *D"]) -> Bool[Tensor, "B"]:
    """Rows without NaN and infinity."""
    return x.isfinite().flatten(1).all(1) if x.ndim > 1 else x.isfinite()


def harmless(x: Shaped[Tensor, "B *D"], used: Bool[Tensor, "B"]) -> Shaped[Tensor, "B *D"]:
    """x, with 0 for what is not finite in the rows that are not used: times 0 it would still be NaN, and so would its gradient.

    A row that all share (an expanded one) is looked at once, whoever uses it.
    """
    if not x.is_floating_point():
        return x
    if len(x) > 1 and x.stride(0) == 0:
        return x[:1].nan_to_num(0.0, 0.0, 0.0).expand_as(x)
    return torch.where(used.view(-1, *[1] * (x.ndim - 1)), x, x.nan_to_num(0.0, 0.0, 0.0))


def weighted_sum(x: Float[Tensor, "*S"], weights: Float[Tensor, "*S"]) -> Float[Tensor, ""]:
    """Sum of x times its weights, where these are not 0."""
    return torch.where(weights != 0, x * weights, 0.0).sum()


def weighted_means(values: Mapping[str, Float[Tensor, "*S"]], weights: Float[Tensor, "*S"]) -> dict[str, Float[Tensor, ""]]:
    """sum(x w) / sum(w) of each of the values, without a gradient; 0 without any weight."""
    total = weights.sum()
    return {name: torch.where(total > 0, weighted_sum(x.detach(), weights) / total, 0.0) for name, x in values.items()}


def masked_mean(x: Float[Tensor, "*S"], mask: Bool[Tensor, "*S"]) -> Float[Tensor, ""]:
    """Sum of the masked values / (their number + 1e-8)."""
    return masked(x, mask).sum() / (mask.sum() + COUNT_EPS)


def row_mean(x: Float[Tensor, "B S"], mask: Bool[Tensor, "B S"]) -> Float[Tensor, "B"]:
    """Mean of each row's masked values; 0 in a row without any."""
    return masked(x, mask).sum(1) / mask.sum(1).clamp(min=1)
