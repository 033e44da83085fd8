"""Supervised fine-tuning, per token, before weights."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

IGNORE = -100
"""The label of a token that is not supervised."""


def nll_loss(logprobs: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """-log p: with weights token-mean the mean over all supervised tokens of the optimizer step."""
    return -logprobs


def dft_loss(logprobs: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """-sg(p) log p: dynamic fine-tuning (arXiv 2508.05629), which does not let improbable tokens dominate."""
    return -logprobs.detach().exp() * logprobs


def targets_of(labels: Int[Tensor, "B S1"]) -> tuple[Int[Tensor, "B S"], Bool[Tensor, "B S"]]:
    """What positions 0 ... n - 2 predict, and whether it is supervised: labels are shifted here, once, and nowhere else.

    A token is supervised iff *its own* label is not -100. Targets of the others are 0, so that they can be looked up.
    """
    shifted = labels[:, 1:]
    mask = shifted != IGNORE
    return torch.where(mask, shifted, 0), mask
