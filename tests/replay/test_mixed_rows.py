"""Rows of two kinds are shared out evenly, whatever their order, and none is lost."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from lit_rl.replay.mixed_rows import count_rows, is_pair, part_of, share_of_rows, with_both_answers
from lit_rl.types import Prompts

KINDS = ["pair", "self_play", "self_play", "pair", "pair", "pair", "self_play", "self_play", "pair", "self_play", "pair", "self_play"]
INFO = [{"prompt": str(i), "kind": kind} for i, kind in enumerate(KINDS)]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("updates", [1, 2])
def test_each_process_has_as_many_rows_of_each_step_and_kind(world: int, updates: int) -> None:
    shares = [share_of_rows(INFO, updates=updates, rank=rank, world_size=world) for rank in range(world)]
    assert sorted(row for share in shares for row in share) == list(range(len(INFO)))
    for step in range(updates):
        for pair in (True, False):
            counts = [sum(row % updates == step and is_pair(INFO[row]) == pair for row in share) for share in shares]
            assert max(counts) - min(counts) <= 1


def test_pairs_stand_twice_and_parts_keep_their_groups() -> None:
    batch = Prompts(group=torch.tensor([7, -1]), info=INFO[:2])
    assert with_both_answers(batch).group.tolist() == [0, 0, 1, 1] and with_both_answers(batch).text == ["0", "0", "1", "1"]
    part = part_of(batch, torch.tensor([False, True]))
    assert part.group.tolist() == [-1] and part.text == ["1"]
    assert len(part_of(batch, torch.zeros(2, dtype=torch.bool))) == 0


def test_rows_are_counted_by_their_ids() -> None:
    group = torch.tensor([4, 4, 4, 9, 9, 2, 2])
    assert count_rows(group, group == 2).tolist() == [2, 1] and count_rows(group[:0], group[:0] == 2).tolist() == [0, 0]
    assert Counter(map(is_pair, INFO)) == {True: 6, False: 6}
