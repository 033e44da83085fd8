"""Trajectories of several rows, such as the turns of an episode: one reward, one vote in the statistics of a group.

Rows with the same group and the same id in `trajectory` are of one trajectory; ids need to differ within a group only. Without ids
(None) each row is a trajectory of its own. Like `lit_rl.credit.groups`, these take the rows of all processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

Everywhere = Callable[..., Tensor]
"""(function, *columns) -> the rows here of what the function makes of all processes' rows, such as `lit_rl.ranks.on_all_rows`."""


Columns = Mapping[str, Tensor]
"""Name -> "B ...", something about each row, see `lit_rl.types.Rollout`."""

NO_COLUMNS: Columns = MappingProxyType({})


def here(of: Callable[..., Tensor], *columns: Tensor) -> Tensor:
    """`of(*columns)`: the `Everywhere` of a single process."""
    return of(*columns)


def trajectory_numbers(group: Int[Tensor, "B"], trajectory: Int[Tensor, "B"] | None) -> Int[Tensor, "B"]:
    """Number of each row's trajectory: 0, 1, ... in the order of their first rows."""
    if trajectory is None:
        return torch.arange(len(group), device=group.device)
    number = torch.stack([group, trajectory.to(group)], 1).unique(dim=0, return_inverse=True)[1]
    first = _first_rows(number, torch.ones_like(number, dtype=torch.bool))
    return first.argsort().argsort()[number]


def voters(group: Int[Tensor, "B"], trajectory: Int[Tensor, "B"] | None, has_reward: Bool[Tensor, "B"]) -> Int[Tensor, "T"]:
    """The row that votes for each trajectory: its first scored one, or its first where none is."""
    if trajectory is None:
        return torch.arange(len(group), device=group.device)
    number = trajectory_numbers(group, trajectory)
    best, any_row = _first_rows(number, has_reward), _first_rows(number, torch.ones_like(has_reward))
    return torch.where(best < len(number), best, any_row)


def closing_rows(group: Int[Tensor, "B"], trajectory: Int[Tensor, "B"], payable: Bool[Tensor, "B"]) -> Bool[Tensor, "B"]:
    """The last payable row of each trajectory: its one reward goes to that. Payable are rows with a score and a chosen token."""
    number = trajectory_numbers(group, trajectory)
    return _first_rows(number.flip(0), payable.flip(0))[number] == torch.arange(len(number), device=number.device).flip(0)


def trajectory_sums(values: Shaped[Tensor, "B"], group: Int[Tensor, "B"], trajectory: Int[Tensor, "B"] | None) -> Shaped[Tensor, "B"]:
    """For each row the sum over the rows of its trajectory, without NaN; NaN where all are."""
    if trajectory is None:
        return values
    number, known = trajectory_numbers(group, trajectory), ~values.isnan()
    total = torch.zeros_like(values).index_add(0, number, values.where(known, torch.zeros_like(values)))[number]
    some = torch.zeros_like(number).index_add(0, number, known.long())[number] > 0
    return total if not values.is_floating_point() else total.where(some, torch.nan)


def one_vote(
    of: Callable[[Tensor, Tensor, Tensor], Tensor],
    scores: Float[Tensor, "B"],
    group: Int[Tensor, "B"],
    lengths: Int[Tensor, "B"],
    trajectory: Int[Tensor, "B"] | None = None,
) -> Tensor:
    """`of(scores, group, lengths)` of trajectories, given to each of their rows.

    A trajectory's score and length are the sums over its rows; rows that are NaN have no part in its score.
    """
    if trajectory is None:
        return of(scores, group, lengths)
    number = trajectory_numbers(group, trajectory)
    first = _first_rows(number, torch.ones_like(number, dtype=torch.bool))
    columns = trajectory_sums(scores, group, trajectory), group, trajectory_sums(lengths, group, trajectory)
    return of(*(column[first] for column in columns))[number]


class Episodes:
    """Rows of one trajectory behind each other, in their order: T trajectories of K rows at most.

    For what follows rewards from token to token. The rows of a trajectory must all be here, which those that one process played are.
    """

    def __init__(self, group: Int[Tensor, "B"], trajectory: Int[Tensor, "B"] | None) -> None:
        number = trajectory_numbers(group, trajectory)
        size, count = len(number), int(number.max()) + 1 if len(number) else 0
        before = (number[:, None] == number[None, :]).tril(-1).sum(1)
        self.place = torch.full((count, int(before.max()) + 1 if size else 0), size, device=group.device)
        self.place[number, before] = torch.arange(size, device=group.device)
        self.rows = number, before

    def joined(self, x: Shaped[Tensor, "B S"]) -> Shaped[Tensor, "T L"]:
        """The rows of each trajectory as one; 0 where it has fewer than K."""
        return torch.cat([x, torch.zeros_like(x[:1])])[self.place].flatten(1)

    def as_rows(self, x: Shaped[Tensor, "T L"]) -> Shaped[Tensor, "B S"]:
        """The inverse of `joined`."""
        return x.unflatten(1, (self.place.shape[1], -1))[self.rows]


def _first_rows(number: Int[Tensor, "B"], among: Bool[Tensor, "B"]) -> Int[Tensor, "T"]:
    """The first row of each trajectory that is among these; B where there is none."""
    rows = torch.where(among, torch.arange(len(number), device=number.device), len(number))
    count = int(number.max()) + 1 if len(number) else 0
    return torch.full((count,), len(number), device=number.device).scatter_reduce(0, number, rows, "amin")
