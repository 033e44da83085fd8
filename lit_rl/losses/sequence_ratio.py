"""Ratios of whole answers: the geometric mean of the ratios of their tokens (GSPO, arXiv 2507.18071)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lit_rl.losses.masked import masked, row_mean
from lit_rl.losses.policy_gradient import is_clipped


def sequence_log_ratio(
    new: Float[Tensor, "B S"], old: Float[Tensor, "B S"], mask: Bool[Tensor, "B S"], *, limit: float = 10.0
) -> Float[Tensor, "B S"]:
    """new - sg(new) + sg(s_i), s_i = the row's mean of new - old, at most `limit`: GSPO's log-ratio (arXiv 2507.18071, eq. 14).

    Every token carries the value of its sequence and its own gradient, so that advantages may differ within a row.
    """
    mean = row_mean(new.detach() - old, mask)[:, None]
    return masked(new - new.detach() + mean, mask).clamp(max=limit)


def answer_ratios(
    new: Float[Tensor, "B S"],
    old: Float[Tensor, "B S"],
    advantages: Float[Tensor, "B S"],
    mask: Bool[Tensor, "B S"],
    *,
    counted: Bool[Tensor, "B"],
    clip_low: float,
    clip_high: float,
) -> tuple[dict[str, Float[Tensor, ""]], Float[Tensor, ""]]:
    """Sums over the counted answers with an advantage of their ratio and of those that the clip takes, and the largest ratio (0 of none).

    The sums are named seq_ratio_mean and clipfrac: divided by the number of these answers they are a mean and a share.
    """
    advantage, moved = row_mean(advantages, mask), row_mean(new.detach() - old, mask)
    teaches = (advantage != 0) & counted
    clipped = is_clipped(moved, advantage, clip_low=clip_low, clip_high=clip_high) & teaches
    sums = {"seq_ratio_mean": (moved.exp() * teaches).sum(), "clipfrac": clipped.float().sum()}
    return sums, torch.where(teaches, moved, -torch.inf).amax().exp()
