"""Pairs of a rollout go to optimizer steps by the ids of their groups, in whatever order and number rows come."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lit_rl.errors import ConfigError
from lit_rl.replay.pairs import check_micro_batches, check_updates, first_siblings, micro_batches_within, sibling_numbers, split_pairs
from lit_rl.replay.partition import places

KEY = (3, "split", 0, 0)
RAGGED = torch.tensor([0, 0, 0, 0, 4, 4, 7, 9, 9, 9])


def shares(group: Tensor, used: Tensor, *, updates: int, parts: int) -> list[list[int]]:
    """The pairs of each optimizer step that keep their weight."""
    minibatches = split_pairs(group, used, key=KEY, updates=updates, parts=parts)
    assert len(minibatches) == updates * parts and all(map(len, minibatches)), "a forward for each micro-batch"
    steps = [torch.cat(minibatches[i * parts : (i + 1) * parts]) for i in range(updates)]
    return [pairs[kept].tolist() for pairs, kept in ((places(step)[0], places(step)[1]) for step in steps)]


@pytest.mark.parametrize("group", [RAGGED, RAGGED[torch.randperm(10, generator=torch.Generator().manual_seed(1))]])
@pytest.mark.parametrize(("updates", "parts"), [(1, 1), (2, 3), (5, 2)])
def test_every_used_pair_is_trained_once(group: Tensor, updates: int, parts: int) -> None:
    used = torch.rand(10, 3, generator=torch.Generator().manual_seed(2)) < 0.7
    trained = [pair for step in shares(group, used, updates=updates, parts=parts) for pair in step]
    assert sorted(trained) == used.flatten().nonzero()[:, 0].tolist()


@pytest.mark.parametrize("updates", [2, 3, 4])
def test_each_step_has_an_equal_share_of_every_group(updates: int) -> None:
    """Up to one pair, whatever the group's size."""
    shuffled = RAGGED[torch.randperm(10, generator=torch.Generator().manual_seed(5))]
    for step in shares(shuffled, torch.ones(10, 3, dtype=torch.bool), updates=updates, parts=1):
        there = shuffled[torch.tensor(step) // 3]
        for g in RAGGED.unique():
            assert abs(int((there == g).sum()) - 3 * int((g == RAGGED).sum()) / updates) < 1


def test_the_order_of_groups_changes_nothing() -> None:
    """Whole groups at other places: the same trajectories and steps in each optimizer step, in the same order."""
    order = torch.tensor([7, 8, 9, 4, 5, 0, 1, 2, 3, 6])
    used = torch.ones(10, 3, dtype=torch.bool)
    before, after = shares(RAGGED, used, updates=4, parts=2), shares(RAGGED[order], used, updates=4, parts=2)
    assert [[int(order[pair // 3]) * 3 + pair % 3 for pair in step] for step in after] == before


def test_a_process_with_some_groups_has_their_part_of_the_whole() -> None:
    used = torch.ones(10, 3, dtype=torch.bool)
    whole, first, second = (shares(g, u, updates=3, parts=1) for g, u in ((RAGGED, used), (RAGGED[:6], used[:6]), (RAGGED[6:], used[6:])))
    assert whole == [a + [pair + 18 for pair in b] for a, b in zip(first, second)]


def test_nothing_to_train_is_a_forward_without_weight() -> None:
    minibatches = split_pairs(RAGGED, torch.zeros(10, 3, dtype=torch.bool), key=KEY, updates=2, parts=2)
    assert [rows.tolist() for rows in minibatches] == [[-1]] * 4


def test_siblings_are_counted_wherever_they_stand() -> None:
    """Where they are neighbours the number is i % group_size."""
    assert sibling_numbers(torch.tensor([5, 2, 5, 5, 2])) == [0, 0, 1, 2, 1]
    assert sibling_numbers(torch.arange(3).repeat_interleave(4)) == [i % 4 for i in range(12)]


def test_the_first_of_each_group_leads_it() -> None:
    group = torch.tensor([5, 2, 5, 9, 2])
    leaders, members = first_siblings(group)
    assert leaders.tolist() == [0, 1, 3] and torch.equal(group[leaders][members], group)
    leaders, members = first_siblings(torch.arange(3).repeat_interleave(4))
    assert leaders.tolist() == [0, 4, 8] and torch.equal(members, torch.arange(3).repeat_interleave(4))


def test_micro_batches_hold_no_more_than_they_may() -> None:
    """10 pairs in at most 4 each: 3 micro-batches, 5 where the trainer asks for them, and 2 are too few."""
    assert [micro_batches_within(10, size=4, present=present, updates=1) for present in (1, 3, 5)] == [3, 3, 5]
    with pytest.raises(ConfigError, match="accumulate_grad_batches=2 micro-batches of model.train_micro_batch=4 hold 8 of the 10"):
        micro_batches_within(10, size=4, present=2, updates=1)


def test_what_does_not_go_round_is_refused() -> None:
    check_updates(4, updates=4, passes=2)
    check_micro_batches(4, parts=4)
    with pytest.raises(ConfigError, match="updates_per_iteration=10 asks for 5 optimizer steps.*lower it to at most 8"):
        check_updates(4, updates=5, passes=2)
    with pytest.raises(ConfigError, match="lower it to at most 4"):
        check_micro_batches(4, parts=5)
