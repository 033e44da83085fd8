"""The weight of a token in the loss of an optimizer step: sum(loss * weights), with weights decided once for the whole step."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Aggregation = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm", "dr-grpo", "traj-mean"]
"""How losses "B S" become one number, see `token_weights`."""


def token_weights(
    mask: Bool[Tensor, "B S"],
    mode: Aggregation,
    *,
    tokens: int | None = None,
    sequences: int | None = None,
    scale: int | float | None = None,
    lengths: Int[Tensor, "B"] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "B S"]:
    """Weights w with sum(loss * w) = the mean that `mode` names; 0 where the mask is False.

    | mode                    | weight of token t of row i | who                                                  |
    | token-mean              | 1 / N                      | DAPO, verl's default                                 |
    | seq-mean-token-sum      | 1 / S                      | REINFORCE, LUSPO                                     |
    | seq-mean-token-mean     | 1 / (S n_i)                | the GRPO paper, GSPO                                 |
    | seq-mean-token-sum-norm | 1 / scale                  | verl's Dr. GRPO, which does not divide by the rows   |
    | dr-grpo                 | 1 / (S scale)              | Dr. GRPO (arXiv 2503.20783), scale a constant length |
    | traj-mean               | 1 / (S L_i)                | agents: S trajectories, L_i tokens of all rows of it |

    Call it once per optimizer step on everything, gathered or with the totals, *before* splitting: then micro-batches, accumulation,
    packing and the number of ranks cannot change the gradient. Rows without a token do not count.

    Args:
        tokens: N, True entries of the whole step; default: of this mask.
        sequences: S, rows (or trajectories, for traj-mean) of the whole step; default: the rows of this mask that have a token.
        lengths: L, tokens of each row's trajectory, see `lit_rl.credit.trajectories.trajectory_sums`; default: of the row alone.
        scale: default for seq-mean-token-sum-norm: S of the mask, the padded length, as upstream. dr-grpo needs it.
    """
    weights = mask.to(dtype)
    length = mask.sum(1, keepdim=True)
    if sequences is None:
        sequences = max(int((length > 0).sum()), 1)
    if mode == "token-mean":
        return weights / max(int(mask.sum()) if tokens is None else tokens, 1)
    if mode == "seq-mean-token-sum":
        return weights / sequences
    if mode == "traj-mean" and lengths is not None:
        return weights / (sequences * lengths[:, None].clamp(min=1))
    if mode in ("seq-mean-token-mean", "traj-mean"):
        return weights / (sequences * length.clamp(min=1))
    if mode == "seq-mean-token-sum-norm":
        return weights / (mask.shape[1] if scale is None else scale)
    if scale is None:
        raise ValueError("loss aggregation dr-grpo divides by a constant length: set scale to the longest response allowed")
    return weights / (sequences * scale)


def mixed_weights(
    mask: Bool[Tensor, "B S"], paired: Bool[Tensor, "B"], siblings: Float[Tensor, "B"], *, rows: int, pair: float
) -> Float[Tensor, "B S"]:
    """1 / (N n L) for each of the L tokens of one of n answers to a row, pair / N for each token of a pair's answers.

    rows: N, rows of the data in an optimizer step. siblings: n. pair: Weight of a pair beside another row.
    """
    each = torch.where(paired, pair, 1 / (siblings * mask.sum(1)).clamp(min=1))
    return mask * (each / rows)[:, None]
