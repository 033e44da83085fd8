"""Advantages of turns: the numbers of GiGPO's authors, AReaL, SkyRL and slime, cases by hand, and episodes cut into rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from golden_numbers import assert_close, load_pack
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lit_rl.credit.groups import group_advantages
from lit_rl.credit.rules import GAE, Credit, Group, Returns
from lit_rl.credit.tokens import spread
from lit_rl.credit.trajectories import Episodes, closing_rows, trajectory_sums
from lit_rl.credit.turns import GiGPO, TurnReturns, gigpo_advantages, state_numbers, turn_returns
from lit_rl.credit.weights import Aggregation, token_weights
from lit_rl.errors import ConfigError


def of_turns(rule: Credit, rewards: Tensor, group: Tensor, **columns: Tensor) -> Tensor:
    """Advantages of turns of one token each; NaN is a turn without a reward."""
    mask = torch.ones(len(rewards), 1, dtype=torch.bool)
    known = ~rewards.isnan()
    return rule(rewards.nan_to_num()[:, None], group, mask, has_reward=known, total=lambda x: x, columns=columns)[:, 0]


# ---------------------------------------------------------------------- GiGPO
@pytest.mark.golden
def test_gigpo(golden_dir: Path) -> None:
    """The authors keep the raw return of an episode without siblings, which is an argument here."""
    data, meta = load_pack(golden_dir, "gigpo")
    group, trajectory, gamma = data["in.index"], data["in.traj_index"], meta["common"]["gamma"]
    returns = turn_returns(data["in.step_reward"], group, trajectory, gamma=gamma)
    assert_close(returns, data["step_returns"], what="step_returns")
    assert meta["cases"]
    for case, o in meta["cases"].items():
        similarity = o["similarity_thresh"] if o["enable_similarity"] else None
        state = torch.tensor(state_numbers(list(map(str, data["in.anchor_obs"])), group.tolist(), similarity=similarity))
        assert state.tolist() == data[f"group.{case.split('.')[1]}"].tolist(), case
        found = gigpo_advantages(
            data["in.token_level_rewards"].sum(1),
            returns,
            group,
            trajectory,
            state,
            weight=o["step_advantage_w"],
            std=o["mode"] == "mean_std_norm",
            eps=o["epsilon"],
            raw_alone=True,
        )
        assert_close(spread(found, data["in.response_mask"].bool()), data[f"{case}.advantages"], what=case)


@pytest.mark.golden
def test_gigpo_by_hand(golden_dir: Path) -> None:
    data, meta = load_pack(golden_dir, "gigpo")
    group, trajectory, o = data["hand.index"], data["hand.traj_index"], meta["hand"]
    state = torch.tensor(state_numbers(list(map(str, data["hand.anchor_obs"])), group.tolist()))
    rule = GiGPO(gamma=o["gamma"], weight=o["step_advantage_w"], std=False)
    found = of_turns(rule, data["hand.step_reward"], group, trajectory=trajectory, state=state)
    assert_close(found, data["hand.advantages"], what="hand")


def test_gigpo_needs_states() -> None:
    with pytest.raises(ConfigError, match="model.credit=GiGPO compares turns that began in the same state.*AgentGRPO"):
        of_turns(GiGPO(), torch.zeros(2), torch.zeros(2).long())


def test_an_episode_without_siblings_says_nothing() -> None:
    group, trajectory = torch.tensor([0, 0, 1]), torch.tensor([0, 0, 0])
    found = of_turns(GiGPO(), torch.tensor([0.0, 1.0, 1.0]), group, trajectory=trajectory, state=torch.tensor([0, 1, 0]))
    assert found.tolist() == [0, 0, 0]


# ---------------------------------------------------------------------- discounted turns
@pytest.mark.golden
def test_turn_discount(golden_dir: Path) -> None:
    """AReaL's returns turn by turn and of its workflow, and SkyRL's advantage of the last turn for all turns."""
    data, meta = load_pack(golden_dir, "turn_discount")
    seen = set()
    for case, o in meta["cases"].items():
        if o["impl"] == "AReaL InteractionCache":
            rewards = data[f"{case}.rewards_in"]
            one = torch.zeros(len(rewards), dtype=torch.long)
            found, wanted = turn_returns(rewards, one, one, gamma=o["turn_discount"]), data[f"{case}.returns"]
        elif o["impl"] == "AReaL MultiTurnWorkflow":
            turns = int(data[f"{case}.turns"])
            solved = float(o["solved_at_turn"] <= o["max_turns"])
            one = torch.zeros(turns, dtype=torch.long)
            rewards = torch.tensor([0.0] * (turns - 1) + [solved], dtype=torch.float64)
            found, wanted = turn_returns(rewards, one, one, gamma=o["turn_discount"])[:1], data[f"{case}.reward"].double()
        elif o["impl"] == "SkyRL" and o["estimator"] == "grpo":
            last, mask = data["in.skyrl_is_last_step"].bool(), data["in.skyrl_response_mask"].bool()
            scores = torch.where(last, data["in.skyrl_rewards"].sum(1), 0.0)
            trajectory = last.long().cumsum(0) - last.long()
            rule = Group(std=o["norm_by_std"])
            rewards = torch.zeros(mask.shape, dtype=torch.float64)
            rewards[:, 0] = scores
            found = rule(
                rewards,
                data["in.skyrl_uids"],
                mask,
                has_reward=torch.ones_like(last),
                total=lambda x: x,
                columns={"trajectory": trajectory},
            )
            wanted = data[f"{case}.advantages"]
        else:
            continue
        seen.add(o["impl"])
        assert_close(found, wanted, what=case, f64=1e-6)
    assert len(seen) == 3


def test_turns_relative_to_their_group_by_hand() -> None:
    """Discount 1/2: returns 1/2, 1 and 0, 0, 0; mean returns 3/4 and 0, so that the baseline is 3/8 whatever the numbers of turns."""
    rewards, trajectory = torch.tensor([0, 1, 0, 0, 0], dtype=torch.float64), torch.tensor([0, 0, 1, 1, 1])
    group = torch.zeros(5, dtype=torch.long)
    found = of_turns(TurnReturns(gamma=0.5, std=False), rewards, group, trajectory=trajectory)
    assert found.tolist() == [1 / 8, 5 / 8, -3 / 8, -3 / 8, -3 / 8]
    whole = of_turns(TurnReturns(gamma=0.5, std=False, whole=True), rewards, group, trajectory=trajectory)
    assert whole.tolist() == [1 / 4, 1 / 4, -1 / 4, -1 / 4, -1 / 4]


@pytest.mark.parametrize("std", [False, True])
def test_turns_without_discount_are_whole_episodes(std: bool) -> None:
    rewards = torch.tensor([0, 1, 0, 0, 0.5, torch.nan, 7], dtype=torch.float64)
    group, trajectory = torch.tensor([0, 0, 0, 0, 0, 0, 1]), torch.tensor([0, 0, 1, 1, 2, 3, 0])
    found = of_turns(TurnReturns(gamma=1.0, std=std), rewards, group, trajectory=trajectory)
    closing = closing_rows(group, trajectory, ~rewards.isnan())
    torch.testing.assert_close(found, of_turns(Group(std=std), rewards.where(closing, rewards), group, trajectory=trajectory))
    assert found[-1] == found[-2] == 0, "alone in its group, and without a reward"


@pytest.mark.parametrize("rule", [TurnReturns, GiGPO])
def test_a_discount_above_one_is_refused(rule: type[Any]) -> None:
    with pytest.raises(ConfigError, match="model.credit.gamma=1.5 must be in"):
        rule(gamma=1.5)


# ---------------------------------------------------------------------- weights of turns
@pytest.mark.golden
def test_slime_reducer(golden_dir: Path) -> None:
    """A trajectory weighs the same whatever its turns (`traj-mean`); slime's other reducers; its rewards relative to their group.

    Where a trajectory has several samples slime compares all samples of the batch as if they were one group, each sample with a vote.
    """
    data, meta = load_pack(golden_dir, "slime_rollout_reducer")
    lengths = data["in.response_lengths"].tolist()
    mask = torch.zeros(len(lengths), max(lengths), dtype=torch.bool)
    loss = torch.zeros(mask.shape, dtype=torch.float64)
    for i, (kept, values) in enumerate(zip(data["in.loss_mask"].split(lengths), data["in.per_token_loss"].split(lengths), strict=True)):
        mask[i, : len(kept)], loss[i, : len(kept)] = kept.bool(), values
    number = data["in.rollout_id"]
    per_trajectory = trajectory_sums(mask.sum(1), torch.zeros_like(number), number)
    modes: dict[str, Aggregation] = {
        "per_rollout": "traj-mean",
        "per_sample": "seq-mean-token-mean",
        "per_token_sum": "seq-mean-token-sum",
    }
    for case, o in meta["cases"].items():
        if case in modes:
            size = o["global_batch_size"]
            weights = token_weights(mask, modes[case], sequences=size, lengths=per_trajectory, dtype=torch.float64)
            assert_close((weights * loss).sum(), data[f"{case}.loss"], what=case)
        else:
            rewards = data[f"in.equal_rewards_std{case.split('.')[1][-1]}"] if o["equal"] else data["in.reward"]
            size = o["n_samples_per_prompt"] if o["equal"] else len(rewards)
            group = torch.arange(len(rewards)) // size
            found = group_advantages(rewards, group, std="group" if o["grpo_std_normalization"] else "none", ddof=1, eps=1e-6)
            assert_close(found, data[f"{case}.rewards"], what=case, f64=1e-6)


# ---------------------------------------------------------------------- rules that follow tokens, over the turns of an episode
@st.composite
def pieces(draw: st.DrawFn) -> tuple[list[list[int]], int]:
    count = draw(st.integers(1, 4))
    return [draw(st.lists(st.integers(1, 3), min_size=1, max_size=4)) for _ in range(count)], draw(st.integers(0, 2**31))


@settings(deadline=None, max_examples=40)
@given(found=pieces(), gamma=st.sampled_from([1.0, 0.7]))
def test_an_episode_cut_into_turns_has_the_returns_of_a_whole_one(found: tuple[list[list[int]], int], gamma: float) -> None:
    """Returns and GAE of tokens do not care where one turn ends and the next begins."""
    cut, seed = found
    draw = torch.Generator().manual_seed(seed)
    whole = torch.zeros(len(cut), 12, dtype=torch.bool)
    for i, turns in enumerate(cut):
        whole[i, : sum(turns)] = True
    rewards, values = torch.randn(2, *whole.shape, dtype=torch.float64, generator=draw)
    trajectory = torch.tensor([i for i, turns in enumerate(cut) for _ in turns])
    group = torch.zeros_like(trajectory)
    starts = [sum(turns[:k]) for turns in cut for k in range(len(turns))]
    lengths = [length for turns in cut for length in turns]

    def rows(x: Tensor) -> Tensor:
        out = torch.zeros(len(lengths), 3, dtype=x.dtype)
        for row, (i, start, length) in enumerate(zip(trajectory.tolist(), starts, lengths, strict=True)):
            out[row, :length] = x[i, start : start + length]
        return out

    mask = rows(whole)
    ours = Returns(gamma=gamma)(rows(rewards), group, mask, has_reward=mask[:, 0], total=lambda x: x, columns={"trajectory": trajectory})
    one = Returns(gamma=gamma)(rewards, torch.arange(len(cut)), whole, has_reward=whole[:, 0], total=lambda x: x)
    torch.testing.assert_close(ours, rows(one))
    rule = GAE(gamma=gamma, lam=0.6)
    theirs = rule(rewards, values, whole, total=lambda x: x)
    turned = rule(rows(rewards), rows(values), mask, total=lambda x: x, episodes=Episodes(group, trajectory))
    for part, wanted in zip(turned, theirs, strict=True):
        torch.testing.assert_close(part, rows(wanted))


def test_groups_that_hardly_differ_teach_nothing() -> None:
    """Standard deviations 0.007 and 0.71 beside a limit of 0.05."""
    rewards, group = torch.tensor([0.5, 0.51, 0.0, 1.0], dtype=torch.float64), torch.tensor([0, 0, 1, 1])
    found = of_turns(Group(std=False, min_std=0.05), rewards, group)
    assert found.tolist() == [0.0, 0.0, -0.5, 0.5]
    assert of_turns(Group(std=False), rewards, group)[0] != 0
    with pytest.raises(ConfigError, match="model.credit.min_std=-1.0 must not be negative"):
        Group(min_std=-1.0)
