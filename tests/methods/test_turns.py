"""A method whose rows are turns of episodes: one reward, one vote and one weight for each episode, all the way to the loss."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_text import Digits, policy, trainer

from lit_rl.credit.length_penalty import LengthPenalty
from lit_rl.credit.trajectories import trajectory_numbers
from lit_rl.methods.grpo import DAPO, GRPO
from lit_rl.methods.ppo import PPO
from lit_rl.modules.dynamic import DynamicSampling
from lit_rl.replay.pairs import sibling_numbers
from lit_rl.rollouts.answers import Answers
from lit_rl.rollouts.base import Sampling
from lit_rl.types import Prompts, TokenRollout


class Turns:
    """Every two answers to a prompt are turns of one episode, which earns what its first turn does."""

    def sample(self, prompts: Prompts) -> TokenRollout:
        rollout: TokenRollout = super().sample(prompts)  # type: ignore[misc]
        return rollout.with_columns(trajectory=torch.tensor(sibling_numbers(rollout.group)) // 2)

    def score(self, rollout: TokenRollout) -> TokenRollout:
        scored: TokenRollout = super().score(rollout)  # type: ignore[misc]
        first = [i - n % 2 for i, n in enumerate(sibling_numbers(rollout.group))]
        noise = torch.rand(len(first), generator=torch.Generator().manual_seed(0)).double()  # nearly all groups teach
        return replace(scored, rewards={"exact": noise[first]})


class TurnsGRPO(Turns, GRPO):
    pass


class TurnsDAPO(Turns, DAPO):
    pass


class TurnsPPO(Turns, PPO):
    pass


def run(folder: Path, method: type[Any], **settings: Any) -> Any:
    defaults: dict[str, Any] = dict(
        prompts_per_iteration=4, prompts_per_update=2, group_size=6, answers=Answers(sampling=Sampling(max_new_tokens=5))
    )
    made = method(policy(folder), **defaults | settings)
    trainer(max_epochs=1, check_val_every_n_epoch=9, accumulate_grad_batches=2).fit(made, datamodule=Digits())
    return made


@pytest.mark.parametrize("method", [TurnsGRPO, TurnsDAPO])
def test_episodes_of_two_answers(sorting_lm: Path, method: type[GRPO]) -> None:
    """Three episodes in each of four groups, two groups in each of two optimizer steps: six episodes weigh 1 / 6 each."""
    settings = (
        {"dynamic_sampling": DynamicSampling(prompts_per_generation=2), "length_penalty": LengthPenalty()} if method is TurnsDAPO else {}
    )
    made = run(sorting_lm, method, aggregation="traj-mean", **settings)
    rollout = made.rollout
    number = trajectory_numbers(rollout.group, rollout.columns["trajectory"])
    assert len(rollout) == 24 and int(number.max()) == 11
    weights = torch.zeros(12).index_add(0, number, rollout.weights.sum(1))
    torch.testing.assert_close(weights, torch.full((12,), 1 / 6))
    lead = rollout.advantages.sum(1) / rollout.mask.sum(1)
    for group in rollout.group.unique():
        rows = rollout.group == group
        rewards = rollout.rewards["exact"][rows][::2]  # each episode's
        expected = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
        torch.testing.assert_close(lead[rows], expected.repeat_interleave(2).float(), rtol=1e-4, atol=1e-4)
    assert made.rollout_metrics["group_size_mean"] == 3.0 and made.rollout_metrics["samples"] == 24


def test_a_critic_learns_the_reward_of_the_whole_episode(sorting_lm: Path) -> None:
    """Without discount the return of every token of both turns is the reward, which is paid at the end of the second."""
    rollout = run(sorting_lm, TurnsPPO).rollout
    number = trajectory_numbers(rollout.group, rollout.columns["trajectory"])
    for episode in range(int(number.max()) + 1):
        rows = number == episode
        returns = rollout.streams["returns"][rows][rollout.mask[rows]]
        torch.testing.assert_close(returns, rollout.rewards["exact"][rows][-1].float().expand_as(returns), atol=1e-5, rtol=0)
