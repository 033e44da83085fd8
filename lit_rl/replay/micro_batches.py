"""Rows of a rollout of tokens in micro-batches: those of each optimizer step, each micro-batch of about equal cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lit_rl.replay.partition import balanced_parts, places

Units = Callable[[Tensor], list[Tensor]]
"""Rows -> pieces of them that stay whole."""


def split_rows(step: Tensor, useful: Tensor, lengths: Tensor, *, units: Units, updates: int, parts: int) -> list[Tensor]:
    """`parts` micro-batches of each of `updates` optimizer steps in order, of the useful rows.

    Where these are too few for a forward in each micro-batch, which other processes wait for, others fill up without their weight, as
    often as it takes: a row r < 0 is row ~r without it, see `lit_rl.replay.partition.places`.

    step: Int "B", the optimizer step of each row. useful: Bool "B". lengths: Int "B", tokens. All are on the CPU. Raises ValueError where
    there is no row at all.
    """
    minibatches: list[Tensor] = []
    for update in range(updates):
        rows = (step == update).nonzero()[:, 0]
        pieces = units(rows[useful[rows]])
        spare = units(rows[~useful[rows]]) or pieces or units(torch.arange(len(step)))
        missing = max(0, parts - len(pieces)) if spare else 0
        pieces = pieces + [~spare[i % len(spare)] for i in range(missing)]
        minibatches += cut_evenly(pieces, lengths, parts=parts)
    return minibatches


def cut_evenly(units: Sequence[Tensor], lengths: Tensor, *, parts: int) -> list[Tensor]:
    """`units` of rows in `parts` of about equal cost, each of similar lengths. lengths: Int "B", tokens of all rows."""
    costs = [len(unit) * int(lengths[places(unit)[0]].max()) for unit in units]
    return [torch.cat([units[i] for i in part]) for part in balanced_parts(costs, parts=parts)]
