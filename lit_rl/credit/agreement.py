"""Two rewards that order the same samples differently."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor


def discordance(a: Float[Tensor, "B"], b: Float[Tensor, "B"], group: Int[Tensor, "B"]) -> tuple[float, float]:
    """Pairs of siblings that two rewards order in opposite ways, and pairs that both of them order (Kendall's discordant pairs).

    Ties, and samples that one of them has no score for, order nothing.
    """
    against = ordered = 0.0
    for rows in (group == own for own in group.unique()):
        order_a, order_b = ((x[rows][:, None] - x[rows][None, :]).sign().nan_to_num(0.0) for x in (a, b))
        product = (order_a * order_b).triu(1)
        against, ordered = against + float((product < 0).sum()), ordered + float((product != 0).sum())
    return against, ordered
