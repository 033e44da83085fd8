"""Rows in micro-batches: each useful row once, and a forward in each micro-batch whatever a process has."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lit_rl.replay.micro_batches import split_rows
from lit_rl.replay.partition import places


def alone(rows: Tensor) -> list[Tensor]:
    return list(rows[:, None])


def trained(minibatches: list[Tensor]) -> list[int]:
    rows, kept = places(torch.cat(minibatches))
    return sorted(rows[kept].tolist())


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("useful", [[1, 1, 0, 1, 1, 0, 1], [0, 0, 0, 0, 0, 0, 1], [0] * 7, [1] * 7])
def test_useful_rows_are_trained_once_in_their_step(parts: int, useful: list[int]) -> None:
    step, counts = torch.tensor([0, 1, 0, 1, 0, 0, 1]), torch.tensor(useful, dtype=torch.bool)
    minibatches = split_rows(step, counts, torch.arange(2, 9), units=alone, updates=2, parts=parts)
    assert len(minibatches) == 2 * parts and all(map(len, minibatches))
    for update in range(2):
        mine = minibatches[update * parts : (update + 1) * parts]
        assert trained(mine) == ((step == update) & counts).nonzero()[:, 0].tolist()


def test_a_process_with_few_rows_repeats_them_without_weight() -> None:
    """One row, of step 1, where others have four micro-batches in each of two steps."""
    minibatches = split_rows(torch.tensor([1]), torch.tensor([True]), torch.tensor([5]), units=alone, updates=2, parts=4)
    assert sorted(map(torch.Tensor.tolist, minibatches)) == [[-1]] * 7 + [[0]]


def test_pieces_stay_whole() -> None:
    def pairs(rows: Tensor) -> list[Tensor]:
        return list(rows.view(-1, 2))

    minibatches = split_rows(
        torch.zeros(6), torch.ones(6, dtype=torch.bool), torch.tensor([2, 9, 2, 2, 5, 5]), units=pairs, updates=1, parts=2
    )
    assert sorted(map(torch.Tensor.tolist, minibatches)) == [[0, 1], [4, 5, 2, 3]]


def test_no_row_at_all_is_an_error() -> None:
    none = torch.zeros(0, dtype=torch.long)
    with pytest.raises(ValueError, match="0 sequences cannot be cut into 1 parts"):
        split_rows(none, none.bool(), none, units=alone, updates=1, parts=1)
