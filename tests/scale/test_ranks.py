"""Collectives of three processes that have different numbers of rows, some of them none."""

from __future__ import annotations

import pytest
import torch
from pair import Pair

from lit_rl.ranks import exchange_objects, gather_objects, gather_rows, gather_to_first, on_all_rows, place, sum_over_ranks


@pytest.mark.parametrize("counts", [[0, 1, 5], [5, 0, 1], [2, 2, 2], [0, 0, 0], [0, 3, 0]])
@pytest.mark.parametrize("dtype", ["float32", "long"])
def test_rows_come_in_order_of_rank(three: Pair, counts: list[int], dtype: str) -> None:
    expected = [[10 * rank, i] for rank, count in enumerate(counts) for i in range(count)]
    assert three.run("ragged.gathered_rows", counts=counts, dtype=dtype) == [expected] * 3


def test_truth_values_are_gathered_too(three: Pair) -> None:
    assert three.run("ragged.gathered_rows", counts=[0, 1, 2], dtype="bool") == [[[True, False], [True, False], [True, True]]] * 3


def test_a_group_may_be_split_over_processes(three: Pair) -> None:
    """Group 4 has a row on each of two processes, 7 on one, and the first process has nothing."""
    found = three.run("ragged.centred_in_groups", groups=[[], [4], [7, 4, 7, 7, 4]], values=[[], [1.0], [1.0, 2.0, 2.0, 6.0, 6.0]])
    assert found == [[], [-2.0], [-2.0, -1.0, -1.0, 3.0, 3.0]]


def test_rewards_that_compare_see_groups_that_are_cut_over_processes(three: Pair) -> None:
    """Group 4 is on two processes, 7 whole on one, 8 on all three, one of which has nothing but one member; then none has any."""
    groups, values = [[8], [4, 8], [7, 4, 7, 7, 4, 8]], [[1.0], [1.0, 3.0], [1.0, 2.0, 2.0, 6.0, 6.0, 5.0]]
    found = three.run("ragged.compared", groups=groups, values=values, size=3)
    assert found == [[-2.0], [-2.0, 0.0], [-2.0, -1.0, -1.0, 3.0, 3.0, 2.0]]
    assert three.run("ragged.compared", groups=[[], [0], []], values=[[], [5.0], []], size=3) == [[], [0.0], []]
    assert three.run("ragged.compared", groups=[[], [], []], values=[[], [], []], size=3) == [[], [], []]


EPISODES: dict[str, list[float]] = {
    "scores": [1.0, 1.0, 0.0, 0.5, 0.5, 0.5, 0.25, 0.0],
    "group": [4, 4, 4, 4, 4, 4, 9, 9],
    "trajectory": [0, 0, 1, 2, 2, 2, 0, 1],
    "lengths": [1, 4, 2, 3, 0, 1, 2, 4],
}
"""Two groups: one of episodes of two, one and three rows, the other of two rows."""


@pytest.mark.parametrize("rule", ["Group", "LeaveOneOut", "LengthWeighted", "PassAtK", "ReturnsBaseline"])
def test_groups_and_episodes_that_are_split_are_credited_as_whole_ones(three: Pair, rule: str) -> None:
    """Whole on one process, and with rows of an episode on three of them in another order."""
    whole, _, _ = three.run("ragged.credited", rows=[list(range(8)), [], []], rule=rule, columns=EPISODES)
    assert any(whole[0]) and sum(whole[1]) == pytest.approx(1.0)
    for rows in ([[7, 3], [0, 2, 5, 6], [4, 1]], [[], [1, 0, 4, 6, 5], [3, 2, 7]]):
        split = three.run("ragged.credited", rows=rows, rule=rule, columns=EPISODES)
        for mine, (advantages, weights) in zip(rows, split):
            assert advantages == pytest.approx([whole[0][row] for row in mine], abs=1e-9)
            assert weights == pytest.approx([whole[1][row] for row in mine], abs=1e-9)


def test_all_have_the_sum_and_the_objects(three: Pair) -> None:
    found = three.run("ragged.other_collectives", values=[[0.1, 1.0], [0.2, 2.0], [0.3, 3.0]])
    expected = torch.stack([torch.tensor([0.1, 1.0]), torch.tensor([0.2, 2.0]), torch.tensor([0.3, 3.0])]).sum(0).tolist()
    for rank, answer in enumerate(found):
        assert answer["sum"] == expected and answer["objects"] == [{"rank": r} for r in range(3)]
        assert answer["first"] == [[r, f"of {r}"] for r in (range(3) if rank == 0 else [rank])]
        assert answer["exchanged"] == [f"from {r} to {rank}" * (1 + 100 * rank) for r in range(3)], "objects of different sizes"


def test_one_process_has_its_own() -> None:
    x = torch.arange(6.0).view(3, 2)
    assert place() == (0, 1) and gather_rows(x) is x and sum_over_ranks(x) is x and gather_objects("a") == ["a"]
    assert torch.equal(on_all_rows(torch.add, x, x), 2 * x) and gather_to_first("a") == {0: "a"} and exchange_objects(["a"]) == ["a"]
