"""Rows that are turns of one episode have one reward, one vote and one weight; siblings are told by ids, wherever they stand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lit_rl.credit.groups import group_metrics
from lit_rl.credit.maxrl import MaxRL
from lit_rl.credit.rules import Group, GroupCredit, LeaveOneOut, LengthWeighted, PassAtK, ReturnsBaseline
from lit_rl.credit.tokens import groups_that_teach, place_scores
from lit_rl.credit.trajectories import closing_rows, trajectory_numbers, trajectory_sums, voters
from lit_rl.credit.weights import token_weights

RULES = [Group(), Group(std=False), LeaveOneOut(), LengthWeighted(), PassAtK(), MaxRL(), ReturnsBaseline()]
by_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)

GROUP = torch.tensor([5, 2, 5, 5, 2, 5, 2])
TRAJECTORY = torch.tensor([1, 0, 0, 1, 1, 0, 1])
"""In group 5 rows 0, 3 and rows 2, 5; in group 2 row 1 and rows 4, 6."""
SCORED = torch.tensor([True, True, False, True, True, True, False])


# ---------------------------------------------------------------------- which rows are one
def test_ids_need_to_differ_within_a_group_alone() -> None:
    assert trajectory_numbers(GROUP, TRAJECTORY).tolist() == [0, 1, 2, 0, 3, 2, 3]
    assert trajectory_numbers(GROUP, None).tolist() == list(range(7))


def test_the_first_scored_row_votes_and_the_last_one_is_paid() -> None:
    assert voters(GROUP, TRAJECTORY, SCORED).tolist() == [0, 1, 5, 4]
    assert closing_rows(GROUP, TRAJECTORY, SCORED).tolist() == [False, True, False, True, True, True, False]
    nothing = torch.zeros(7, dtype=torch.bool)
    assert voters(GROUP, TRAJECTORY, nothing).tolist() == [0, 1, 2, 4] and not closing_rows(GROUP, TRAJECTORY, nothing).any()


def test_sums_leave_out_what_is_not_known() -> None:
    values = torch.tensor([1.0, 2.0, torch.nan, 4.0, torch.nan, 16.0, torch.nan])
    expected = torch.tensor([5.0, 2.0, 16.0, 5.0, torch.nan, 16.0, torch.nan])
    torch.testing.assert_close(trajectory_sums(values, GROUP, TRAJECTORY), expected, equal_nan=True)
    assert trajectory_sums(torch.arange(7), GROUP, TRAJECTORY).tolist() == [3, 1, 7, 3, 10, 7, 10]
    assert trajectory_sums(values, GROUP, None) is values


def test_no_rows_are_no_trajectories() -> None:
    none = torch.zeros(0, dtype=torch.long)
    assert len(trajectory_numbers(none, none)) == len(voters(none, none, none.bool())) == len(closing_rows(none, none, none.bool())) == 0


# ---------------------------------------------------------------------- advantages by hand
def of_rule(rule: GroupCredit, scores: Tensor, group: Tensor, mask: Tensor, trajectory: Tensor | None = None) -> Tensor:
    """Advantages of rows whose trajectories have these scores."""
    has_reward = scores.isfinite()
    paid = has_reward if trajectory is None else closing_rows(group, trajectory, has_reward & mask.any(1))
    rewards = place_scores(scores.nan_to_num().where(paid, 0.0).double(), mask)
    return rule(
        rewards, group, mask, has_reward=has_reward, total=lambda x: x, columns={} if trajectory is None else {"trajectory": trajectory}
    )


def test_an_episode_of_many_turns_has_one_vote() -> None:
    """Episodes of 3, 1 and 1 turns earn 1, 0, 0: mean 1/3, not 3/5; each turn has its episode's advantage."""
    scores, group, trajectory = torch.tensor([1.0, 1, 1, 0, 0]), torch.zeros(5, dtype=torch.long), torch.tensor([7, 7, 7, 8, 9])
    found = of_rule(Group(std=False), scores, group, torch.ones(5, 2, dtype=torch.bool), trajectory)
    torch.testing.assert_close(found, torch.tensor([2 / 3] * 3 + [-1 / 3] * 2, dtype=torch.float64)[:, None].expand(5, 2))
    alone = of_rule(LeaveOneOut(), scores, group, torch.ones(5, 2, dtype=torch.bool), trajectory)
    torch.testing.assert_close(alone[:, 0], torch.tensor([1.0, 1, 1, -0.5, -0.5], dtype=torch.float64))


def test_a_turn_without_a_score_leaves_its_episode_its_own() -> None:
    scores = torch.tensor([1.0, torch.nan, 0.0, torch.nan])
    trajectory, mask = torch.tensor([0, 0, 1, 2]), torch.ones(4, 1, dtype=torch.bool)
    found = of_rule(Group(std=False), scores, torch.zeros(4, dtype=torch.long), mask, trajectory)[:, 0]
    assert found.tolist() == [0.5, 0.5, -0.5, 0.0], "trajectory 2 has no score at all"


def test_statistics_count_episodes() -> None:
    """Two groups: in one an episode of two turns alone, which is a group of one; in the other two episodes with the same reward."""
    group, trajectory = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0, 0, 0, 0, 1])
    rewards = torch.tensor([1.0, 1.0, 0.5, 0.5, 0.5])
    row = voters(group, trajectory, ~rewards.isnan())
    assert groups_that_teach(rewards[row], group[row]).tolist() == [True, False, False]
    metrics = group_metrics(rewards[row], group[row])
    assert metrics["reward_mean"] == pytest.approx(2 / 3) and metrics["group_size_mean"] == 1.5


def test_weights_of_trajectories_by_hand() -> None:
    """Two trajectories, of 2 + 1 and of 1 tokens: each weighs 1 / 2, spread over its tokens; rows as trajectories are their mean."""
    mask = torch.tensor([[True, True], [False, True], [True, False]])
    lengths = trajectory_sums(mask.sum(1), torch.zeros(3, dtype=torch.long), torch.tensor([4, 4, 5]))
    weights = token_weights(mask, "traj-mean", sequences=2, lengths=lengths)
    torch.testing.assert_close(weights, torch.tensor([[1 / 6, 1 / 6], [0, 1 / 6], [1 / 2, 0]]))
    assert torch.equal(token_weights(mask, "traj-mean"), token_weights(mask, "seq-mean-token-mean"))


# ---------------------------------------------------------------------- properties
@st.composite
def episodes(draw: st.DrawFn) -> dict[str, Any]:
    """Scores, tokens and groups of uncut episodes, and how many rows each is cut into."""
    count = draw(st.integers(2, 8))
    scores = draw(st.lists(st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.just(float("nan"))), min_size=count, max_size=count))
    return {
        "scores": torch.tensor(scores, dtype=torch.float64),
        "group": torch.tensor(draw(st.lists(st.sampled_from([3, 8, 11]), min_size=count, max_size=count))),
        "pieces": [draw(st.lists(st.integers(0, 3), min_size=1, max_size=4).filter(any)) for _ in range(count)],
        "order": draw(st.randoms(use_true_random=False)),
    }


def masks(lengths: list[int], width: int = 12) -> Tensor:
    return torch.arange(width) < torch.tensor(lengths)[:, None]


def cut(found: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same episodes in rows, shuffled: episode, score, group and mask of each row."""
    rows = [(i, length) for i, pieces in enumerate(found["pieces"]) for length in pieces]
    found["order"].shuffle(rows)
    episode = torch.tensor([i for i, _ in rows])
    return episode, found["scores"][episode], found["group"][episode], masks([length for _, length in rows])


def shuffled(count: int, found: dict[str, Any]) -> Tensor:
    order = list(range(count))
    found["order"].shuffle(order)
    return torch.tensor(order)


@by_rule
@settings(deadline=None, max_examples=40)
@given(found=episodes())
def test_an_episode_cut_into_rows_has_the_same_advantage(rule: GroupCredit, found: dict[str, Any]) -> None:
    whole = of_rule(rule, found["scores"], found["group"], masks([sum(pieces) for pieces in found["pieces"]]))
    episode, scores, group, mask = cut(found)
    rows = of_rule(rule, scores, group, mask, trajectory=episode + 40)
    torch.testing.assert_close(rows, torch.where(mask, whole[episode, :1], 0.0), rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=40)
@given(found=episodes())
def test_an_episode_cut_into_rows_has_the_same_weight(found: dict[str, Any]) -> None:
    whole = token_weights(masks([sum(pieces) for pieces in found["pieces"]]), "traj-mean", dtype=torch.float64)
    episode, _, group, mask = cut(found)
    lengths = trajectory_sums(mask.sum(1), group, episode)
    sequences = int(closing_rows(group, episode, mask.any(1)).sum())
    rows = token_weights(mask, "traj-mean", sequences=sequences, lengths=lengths, dtype=torch.float64)
    torch.testing.assert_close(torch.zeros(len(whole), dtype=torch.float64).index_add(0, episode, rows.sum(1)), whole.sum(1))
    torch.testing.assert_close(rows.sum(), torch.tensor(1.0, dtype=torch.float64))


@by_rule
@settings(deadline=None, max_examples=40)
@given(found=episodes())
def test_each_row_its_own_trajectory_is_as_without_ids(rule: GroupCredit, found: dict[str, Any]) -> None:
    """To the last bit."""
    _, scores, group, mask = cut(found)
    ids = shuffled(len(scores), found)
    assert torch.equal(of_rule(rule, scores, group, mask), of_rule(rule, scores, group, mask, trajectory=ids))


@by_rule
@settings(deadline=None, max_examples=40)
@given(found=episodes())
def test_siblings_are_told_by_ids_in_any_order(rule: GroupCredit, found: dict[str, Any]) -> None:
    """Groups of unequal size, rows shuffled."""
    _, scores, group, mask = cut(found)
    order = shuffled(len(scores), found)
    before, after = of_rule(rule, scores, group, mask), of_rule(rule, scores[order], group[order], mask[order])
    torch.testing.assert_close(after, before[order], rtol=1e-9, atol=1e-9)
