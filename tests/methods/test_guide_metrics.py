"""The numbers that the language models' guide tells people to watch are logged under its names, and mean what they say."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_text import Digits, model_folder, policy, trainer

from lit_rl.losses.kl import KL, RewardKL
from lit_rl.methods.grpo import GRPO
from lit_rl.methods.ppo import PPO
from lit_rl.rollouts.answers import Answers
from lit_rl.rollouts.base import Sampling

WATCHED = {"policy_loss", "reward_mean", "reward_std", "kl_divergence", "entropy", "clip_fraction"}
SIZES: dict[str, Any] = {"prompts_per_iteration": 64, "answers": Answers(sampling=Sampling(max_new_tokens=5))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("lm") / "model")


def logged(method: Any) -> dict[str, float]:
    run = trainer(max_epochs=1, check_val_every_n_epoch=100)
    run.fit(method, datamodule=Digits())
    return {name: float(value) for name, value in run.callback_metrics.items()}


@pytest.mark.parametrize(
    ("make", "also"),
    [
        (lambda p: GRPO(p, group_size=4, kl=KL(coef=1e-3), **SIZES), set()),
        (lambda p: GRPO(p, group_size=4, kl_in_reward=RewardKL(coef=1e-3), entropy_coef=1e-3, **SIZES), set()),
        (lambda p: PPO(p, kl_in_reward=RewardKL(coef=1e-3), **SIZES), {"value_loss"}),
    ],
    ids=["grpo", "grpo_kl_in_reward", "ppo"],
)
def test_what_the_guide_watches_is_logged(folder: Path, make: Callable[[Any], Any], also: set[str]) -> None:
    metrics = logged(make(policy(folder, keep_reference=True)))
    assert metrics.keys() >= WATCHED | also
    assert metrics["kl_divergence"] == pytest.approx(0, abs=1e-6), "before the first step the policy is the reference"


def test_entropy_of_the_sampled_tokens_is_that_of_the_policy(folder: Path) -> None:
    """An unbiased estimate: over about a thousand tokens of a policy that is nearly uniform over its vocabulary it is within a percent."""
    estimated = logged(GRPO(policy(folder), group_size=4, **SIZES))["entropy"]
    exact = logged(GRPO(policy(folder), group_size=4, entropy_coef=1e-9, **SIZES))["entropy"]
    assert estimated == pytest.approx(exact, rel=0.01) and exact > 1


def test_divergence_in_the_reward_is_logged_where_the_loss_has_none(folder: Path) -> None:
    """log p - log p_ref = x everywhere: k3 = e^-x + x - 1, here with x = 1: 0.3679."""
    method = GRPO(policy(folder, keep_reference=True), group_size=4, kl_in_reward=RewardKL(coef=1e-3), **SIZES)
    of = method.all_logprobs

    def with_reference(rollout: Any, **kwargs: Any) -> torch.Tensor:
        return of(rollout, **kwargs) - float(method.policy.called == "reference_network")

    method.all_logprobs = with_reference  # type: ignore[method-assign]
    assert logged(method)["kl_divergence"] == pytest.approx(0.3679, abs=1e-3)
