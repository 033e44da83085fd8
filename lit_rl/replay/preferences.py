"""Pairs of a chosen and a rejected answer among the rows of a rollout: rows with the same group id, wherever they stand.

The column `preference` is 1 for a chosen answer, -1 for a rejected one and 0 for an answer of the policy, which is in no pair.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_rl.replay.pairs import sibling_numbers


def preferences(group: Tensor) -> Tensor:
    """Int "B": 1 for the first row of each group and -1 for its second. group: Int "B", each id twice."""
    return 1 - 2 * torch.tensor(sibling_numbers(group), dtype=torch.long)


def pair_rows(group: Tensor, preference: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the chosen answers in order, Int "P", and of the rejected answer of each of their pairs. group, preference: Int "B".

    Raises ValueError where an answer has no other to be compared with.
    """
    chosen, rejected = (preference == 1).nonzero()[:, 0], (preference == -1).nonzero()[:, 0]
    same = group[chosen][:, None] == group[rejected]
    if len(chosen) != len(rejected) or not same.any(1).all():
        raise ValueError(f"{len(chosen)} chosen and {len(rejected)} rejected answers do not make pairs with equal group ids")
    return chosen, rejected[same.int().argmax(1)] if len(chosen) else rejected


def of_both(pairs: tuple[Tensor, Tensor], values: Tensor, default: Tensor) -> Tensor:
    """`default` "B" with the values "P" of pairs at the rows of both of their answers."""
    chosen, rejected = pairs
    return default.index_put((chosen,), values).index_put((rejected,), values)


def pair_units(rows: Tensor, group: Tensor, preference: Tensor) -> list[Tensor]:
    """`rows` in pieces that stay whole: a pair, chosen answer first, or an answer of the policy alone. All are on the CPU."""
    of_group: dict[int, list[Tensor]] = {}
    units: list[list[Tensor]] = []
    for row, g, kind in zip(rows, group[rows].tolist(), preference[rows].tolist()):
        if kind == 0:
            units.append([row])
        elif g in of_group:
            of_group[g].insert(0 if kind == 1 else len(of_group[g]), row)
        else:
            units.append(of_group.setdefault(g, [row]))
    return [torch.stack(unit) for unit in units]
