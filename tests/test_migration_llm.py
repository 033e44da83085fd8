"""Every key of the language models' guide has its row in docs/migration_llm.md, and every key that the page sends people to exists."""

from __future__ import annotations

import re
from typing import Any

import lightning as L
import pytest
import torch
from test_migration import PAGES, parameters

from datamodules.pairs import PreferencePairs
from datamodules.prompts_text import TextPrompts
from datamodules.supervised import SupervisedText
from lit_rl import prepare
from lit_rl.command_line.usual import RunFolder, UsualCallbacks
from lit_rl.credit.length_penalty import LengthPenalty
from lit_rl.credit.rules import GAE
from lit_rl.losses.kl import KL, RewardKL
from lit_rl.losses.surrogates import Clip
from lit_rl.methods.dpo import DPO
from lit_rl.methods.grpo import DAPO, GRPO
from lit_rl.methods.ppo import PPO, CriticTraining
from lit_rl.methods.sft import SFT
from lit_rl.modules.dynamic import DynamicSampling
from lit_rl.policies.causal_lm import CausalLM
from lit_rl.policies.critic import Critic
from lit_rl.policies.weights.lora import LoraSettings
from lit_rl.rollouts.answers import Answers
from lit_rl.rollouts.base import Sampling

TEXT = PAGES["migration_llm"]
OLD = """
    data.train_files data.val_files data.train_batch_size data.max_prompt_length data.max_response_length data.max_length data.prompt_key
    data.response_key data.filter_overlong_prompts data.truncation actor_rollout_ref.model.path model.path model.partial_pretrain
    actor_rollout_ref.model.enable_gradient_checkpointing model.enable_gradient_checkpointing actor_rollout_ref.model.use_remove_padding
    model.lora_rank model.lora_alpha model.target_modules actor_rollout_ref.actor.optim.lr optim.lr
    actor_rollout_ref.actor.ppo_mini_batch_size critic.ppo_mini_batch_size actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu
    actor_rollout_ref.actor.use_kl_loss actor_rollout_ref.actor.kl_loss_coef actor_rollout_ref.actor.kl_loss_type
    actor_rollout_ref.actor.fsdp_config.param_offload actor_rollout_ref.rollout.n actor_rollout_ref.rollout.temperature
    actor_rollout_ref.rollout.name actor_rollout_ref.rollout.tensor_model_parallel_size
    actor_rollout_ref.rollout.gpu_memory_utilization actor_rollout_ref.rollout.mode actor_rollout_ref.rollout.disable_log_stats
    actor_rollout_ref.rollout.prometheus.enable algorithm.adv_estimator algorithm.gamma algorithm.lam algorithm.use_kl_in_reward
    algorithm.beta algorithm.loss_type critic.model.path reward_model.path trainer.critic_warmup trainer.total_epochs
    trainer.n_gpus_per_node trainer.nnodes trainer.save_freq trainer.test_freq trainer.logger trainer.project_name trainer.experiment_name
"""
"""Options of the guide's commands, its YAML examples and its appendix."""

METHODS = [SFT, DPO, GRPO, PPO]
ROOMS: dict[str, list[type]] = {
    "model.init_args.policy.init_args.lora": [LoraSettings],
    "model.init_args.policy.init_args": [CausalLM],
    "model.init_args.critic.init_args": [Critic],
    "model.init_args.answers.sampling": [Sampling],
    "model.init_args.answers": [Answers],
    "model.init_args.kl": [KL],
    "model.init_args.kl_in_reward": [RewardKL],
    "model.init_args.credit": [GAE],
    "model.init_args.critic_training": [CriticTraining],
    "model.init_args.dynamic_sampling": [DynamicSampling],
    "model.init_args.length_penalty": [LengthPenalty],
    "model.init_args.optimizer.init_args": [torch.optim.AdamW],
    "model.init_args": METHODS,
    "data.init_args": [SupervisedText, PreferencePairs, TextPrompts],
    "run.callbacks": [UsualCallbacks],
    "run": [RunFolder],
    "trainer": [L.Trainer],
}
REINFORCED = "kl kl_in_reward entropy_coef surrogate correction length_penalty group_size credit"
OF_SOME: dict[type | tuple[type, ...], str] = {
    (GRPO, PPO): REINFORCED,
    (SFT, GRPO, PPO): "answers",
    (SFT, DPO): "loss_kind",
    DPO: "beta",
    PPO: "critic critic_training",
    DAPO: "dynamic_sampling",
    (SFT, PreferencePairs): "max_length",
    SupervisedText: "response_key",
    TextPrompts: "max_prompt_length filter_overlong_prompts",
    (PreferencePairs, TextPrompts): "truncation",
}
"""Keys that only some classes of their room have."""


def classes(key: str) -> list[type]:
    """Those that must have a key."""
    room = next(room for room in ROOMS if key.startswith(room + "."))
    name = key.removeprefix(room + ".").partition(".")[0]
    if len(ROOMS[room]) > 1:
        for some, names in OF_SOME.items():
            if name in names.split():
                chosen = some if isinstance(some, tuple) else (some,)
                found = [cls for cls in chosen if any(issubclass(cls, base) for base in ROOMS[room])]
                if found:
                    return found
    return ROOMS[room]


def rows() -> list[tuple[list[str], list[str], str]]:
    """Old keys, keys and note of each row of the two tables of keys."""
    tables = TEXT.split("## Keys of the guide")[1].split("## Commands")[0]
    cells = [line.split("|") for line in tables.splitlines() if line.startswith("| `")]
    return [(re.findall(r"`([\w.]+)`", row[1]), re.findall(r"`([\w.]+)`", row[2]), row[3].strip()) for row in cells]


KEYS = list(dict.fromkeys(key for _, keys, _ in rows() for key in keys))


@pytest.mark.parametrize("key", KEYS)
def test_key_exists(key: str) -> None:
    if key in ("seed_everything", "model.class_path"):
        return
    room = next(room for room in ROOMS if key.startswith(room + "."))
    for cls in classes(key):
        assert key.removeprefix(room + ".").partition(".")[0] in parameters(cls), cls


def test_every_key_of_the_guide_has_one_row() -> None:
    named = [key for old, _, _ in rows() for key in old]
    assert len(named) == len(set(named))
    assert set(OLD.split()) <= set(named)


def test_rows_without_a_key_say_why() -> None:
    for old, keys, note in rows():
        assert keys or len(note) > 10, old


def test_long_options_of_the_examples_are_keys() -> None:
    for key in set(re.findall(r"--((?:model|data|trainer)\.[\w.]+)", TEXT)):
        room = next(room for room in ROOMS if key.startswith(room + "."))
        assert all(key.removeprefix(room + ".").partition(".")[0] in parameters(cls) for cls in classes(key)), key


def test_defaults_are_those_that_the_page_tells() -> None:
    import inspect

    def default(cls: type[Any], name: str) -> Any:
        found = [inspect.signature(c.__init__).parameters for c in inspect.getmro(cls) if "__init__" in vars(c)]
        return next(p[name].default for p in found if name in p)

    assert (Sampling().max_new_tokens, Sampling().temperature, Sampling().top_k) == (1024, 1.0, 0)
    assert default(TextPrompts, "max_prompt_length") == 512 and default(SupervisedText, "max_length") == 4096
    assert default(DPO, "beta") == 0.1 and GAE() == GAE(lam=1.0, gamma=1.0)
    assert (CriticTraining().lr, CriticTraining().value_clip) == (1e-5, 0.5)
    assert KL() == KL(coef=0.0, kind="k3") and RewardKL() == RewardKL(coef=0.0, kind="k1") and Clip().dual is None
    assert default(CausalLM, "gradient_checkpointing") is False and default(TextPrompts, "filter_overlong_prompts") is False


def test_data_sets_that_are_prepared_are_known() -> None:
    found = re.findall(r"python -m lit_rl\.prepare (\w+)([^`\n]*)", TEXT)
    assert {name for name, _ in found} == {*prepare.SOURCES, "model"}
    assert {option for _, rest in found for option in re.findall(r"--\w+", rest)} <= {"--from", "--out", "--hub"}
