"""A loss as named terms, each with weights of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from lit_rl.losses.masked import masked_mean, weighted_sum


@dataclass(frozen=True)
class Term:
    """One part of a loss: coef * sum(losses * weights).

    Attributes:
        losses: Float "*S", one number per row or token of a minibatch.
        weights: Float "*S", decided over the whole optimizer step: its sum over all micro-batches and processes is the term of the step.
            Where a weight is 0 the loss does not matter, NaN included.
        coef: How much the term counts in the loss. Its metric, `{name}_loss`, is logged without it.
    """

    losses: Tensor
    weights: Tensor
    coef: float = 1.0

    def sum(self) -> Float[Tensor, ""]:
        """Sum of losses * weights, without `coef`."""
        return weighted_sum(self.losses, self.weights)


Terms = Mapping[str, Term]
"""The terms of a loss by name: `policy`, `kl`, `entropy`, `value`, `sft`, `preference`, ..."""


def token_means(terms: Terms, mask: Bool[Tensor, "B S"]) -> dict[str, Float[Tensor, ""]]:
    """kl_divergence and entropy: means over the masked tokens of the terms `kl` and, with its sign turned, `entropy`."""
    signs = {"kl": ("kl_divergence", 1), "entropy": ("entropy", -1)}
    return {name: sign * masked_mean(terms[key].losses.detach(), mask) for key, (name, sign) in signs.items() if key in terms}
