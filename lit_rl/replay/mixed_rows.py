"""Rows of the data of two kinds in one iteration: prompts that the policy answers, and pairs of answers to learn from as they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_rl.types import Info, Minibatch, Prompts, TokenRollout


def is_pair(info: Info) -> bool:
    """A row of the data that brings its answers with it, see `datamodules.mixed.PromptsAndPairs`."""
    return info.get("kind") == "pair"


def is_given(rows: TokenRollout | Minibatch) -> Tensor:
    """Bool "B": answers from the data, which are in pairs."""
    return rows.columns["preference"] != 0


def share_of_rows(info: Sequence[Info], *, updates: int, rank: int, world_size: int) -> list[int]:
    """Rows of this process: of each optimizer step (row i is of step i mod updates) and of each kind as many as the others have."""
    mine: list[int] = []
    for step in range(updates):
        rows = sorted(range(step, len(info), updates), key=lambda row: is_pair(info[row]))
        mine += rows[rank::world_size]
    return mine


def with_both_answers(batch: Prompts) -> Prompts:
    """Each row of a batch of pairs twice, numbered anew: for its chosen and for its rejected answer."""
    return Prompts(group=torch.arange(len(batch)).repeat_interleave(2), info=[row for row in batch.info for _ in range(2)])


def rows_where(which: Tensor) -> Tensor:
    """Int "N": the rows at which Bool "B" is True."""
    return which.nonzero()[:, 0]


def count_rows(group: Tensor, given: Tensor) -> Tensor:
    """Float64 "2": different rows of the data that are answered, and that are pairs. group: Int "B", given: Bool "B"."""
    counts = [group[which].unique().numel() for which in (~given, given)]
    return torch.tensor(counts, dtype=torch.float64, device=group.device)


def part_of(prompts: Prompts, which: Tensor) -> Prompts:
    """The prompts at which Bool "B" is True."""
    rows = rows_where(which)
    return Prompts(group=prompts.group[rows], info=[prompts.info[i] for i in rows.tolist()])
