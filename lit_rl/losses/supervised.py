"""Supervised fine-tuning, per token, before weights."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def nll_loss(logprobs: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """-log p: with weights token-mean the mean over all supervised tokens of the optimizer step."""
    return -logprobs


def dft_loss(logprobs: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """-sg(p) log p: dynamic fine-tuning (arXiv 2508.05629), which does not let improbable tokens dominate."""
    return -logprobs.detach().exp() * logprobs
