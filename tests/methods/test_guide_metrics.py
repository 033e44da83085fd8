"""The numbers that the language models' guide tells people to watch are logged under its names, and mean what they say."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from digit_world import agent, digit_tasks
from toy import Brightness, ToyData, toy_method
from toy_text import Digits, model_folder, policy, trainer

from callbacks.old_policy import OldPolicySync
from callbacks.reward_scoring import RewardScoring
from datamodules.mixed import PromptsAndPairs
from lit_rl.losses.kl import KL, RewardKL
from lit_rl.methods.diffusion_nft import DiffusionNFT
from lit_rl.methods.dpo import DPO
from lit_rl.methods.flow_grpo import DanceGRPO, FlowGRPO, FlowGRPOFast, GRPOGuard, MixGRPO, RandomStepGRPO
from lit_rl.methods.grpo import DAPO, GRPO, GSPO, RLOO
from lit_rl.methods.gspo_mixed import MixedGSPO
from lit_rl.methods.ppo import PPO
from lit_rl.methods.sft import SFT
from lit_rl.platform.metrics import with_canonical
from lit_rl.platform.records import CANONICAL
from lit_rl.rewards.base import TextReward
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


FLOWS = {"policy_loss", "reward_mean", "kl_divergence"}
TOKENS = set(CANONICAL) - {"value_loss"}
SHORT: dict[str, Any] = {"prompts_per_iteration": 4, "answers": Answers(sampling=Sampling(max_new_tokens=3))}
GROUPS: dict[str, Any] = SHORT | {"group_size": 4}
METHODS: dict[str, tuple[Callable[[Any], Any], set[str]]] = {
    "flow_grpo.FlowGRPO": (lambda _: toy_method(FlowGRPO, kl_coef=0.1), FLOWS | {"clip_fraction"}),
    "flow_grpo.FlowGRPOFast": (lambda _: toy_method(FlowGRPOFast, kl_coef=0.1), FLOWS | {"clip_fraction"}),
    "flow_grpo.MixGRPO": (lambda _: toy_method(MixGRPO, kl_coef=0.1), FLOWS | {"clip_fraction"}),
    "flow_grpo.DanceGRPO": (lambda _: toy_method(DanceGRPO, kl_coef=0.1), FLOWS | {"clip_fraction"}),
    "flow_grpo.GRPOGuard": (lambda _: toy_method(GRPOGuard, kl_coef=0.1), FLOWS | {"clip_fraction"}),
    "flow_grpo.RandomStepGRPO": (lambda _: toy_method(RandomStepGRPO, kl_coef=0.1), FLOWS | {"clip_fraction"}),
    "diffusion_nft.DiffusionNFT": (lambda _: toy_method(DiffusionNFT, kl_coef=0.1), FLOWS),
    "grpo.GRPO": (lambda p: GRPO(p, kl=KL(coef=0.1), **GROUPS), TOKENS),
    "grpo.GSPO": (lambda p: GSPO(p, kl=KL(coef=0.1), **GROUPS), TOKENS),
    "grpo.DAPO": (lambda p: DAPO(p, kl=KL(coef=0.1), dynamic_sampling=None, **GROUPS), TOKENS),
    "grpo.RLOO": (lambda p: RLOO(p, kl=KL(coef=0.1), **GROUPS), TOKENS),
    "gspo_mixed.MixedGSPO": (lambda p: MixedGSPO(p, kl=KL(coef=0.1), **GROUPS), TOKENS),
    "agent_grpo.AgentGRPO": (lambda p: agent(Path(p.pretrained), keep_reference=True, kl=KL(coef=0.1)), TOKENS),
    "ppo.PPO": (lambda p: PPO(p, kl=KL(coef=0.1), **SHORT), set(CANONICAL)),
    "sft.SFT": (lambda p: SFT(p, **SHORT), {"policy_loss"}),
    "dpo.DPO": (lambda p: DPO(p, prompts_per_iteration=4), {"policy_loss"}),
}
"""A small method for each one that a shipped run names, with those of the six canonical metrics that it has."""


def data_of(name: str, folder: Path) -> Any:
    if name.startswith(("flow_grpo", "diffusion_nft")):
        return ToyData()
    if name == "agent_grpo.AgentGRPO":
        return digit_tasks(folder)
    if name != "gspo_mixed.MixedGSPO":
        return Digits()
    rows = [{"prompt": f"{i}2=", "self_play": True} if i % 2 else {"prompt": f"{i}2=", "chosen": "2", "rejected": "9"} for i in range(8)]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return PromptsAndPairs(train=str(folder / "rows.jsonl"), shuffle=False)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_reports_what_it_has_of_the_six(folder: Path, tmp_path: Path, name: str) -> None:
    """They are finite numbers under the names that the platform shows; a single loss counts as the policy's."""
    make, wanted = METHODS[name]
    scored = {} if name.startswith(("flow", "diff")) else {"l": Lengths()}
    old = [OldPolicySync("copy")] if name.startswith("diff") else []
    run = trainer(max_epochs=1, limit_val_batches=0, callbacks=[RewardScoring(scored or {"b": Brightness()}), *old])
    run.fit(make(policy(folder, keep_reference=name != "sft.SFT")), datamodule=data_of(name, tmp_path))
    shown = with_canonical({key: float(value) for key, value in run.callback_metrics.items()})
    assert {key for key in CANONICAL if shown.get(key) is not None} == wanted


def test_these_are_the_methods_of_all_shipped_runs() -> None:
    files = (Path(__file__).parents[2] / "configs").rglob("*.yaml")
    assert {path for file in files for path in re.findall(r"lit_rl\.methods\.([\w.]+)", file.read_text())} <= METHODS.keys()


class Lengths(TextReward):
    """The sum of an answer's characters, which nearly all answers have of their own."""

    outputs = ("length",)

    def score(self, media: Any, info: Any) -> dict[str, torch.Tensor]:
        return {"length": torch.tensor([sum(map(ord, text)) / 100 for text in media])}


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
