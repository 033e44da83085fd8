"""Keys of verl's configuration and keys of a run's YAML. docs/migration_llm.md has a row for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import yaml

from lit_rl.errors import ConfigError
from lit_rl.migrate.migrated import unknown
from lit_rl.migrate.values import Keys, Settings, checked, count, number, one_of, same, switch, text, whole, words

Given = dict[str, object]
MODEL, POLICY = "model.init_args", "model.init_args.policy.init_args"
ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
SURROGATES = {
    "vanilla": "Clip", "gspo": "SequenceClip", "cispo": "Cispo", "sapo": "Sapo", "geo_mean": "GeoMean", "gpg": "Reinforce",
}  # fmt: skip
AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
DIVERGENCES = {"low_var_kl": "k3", "k3": "k3", "kl": "k1", "k1": "k1", "mse": "k2", "k2": "k2", "k3+": "k3+", "low_var_kl+": "k3+"}
ESTIMATORS: Mapping[str, tuple[str, str]] = {
    "gae": ("configs/ppo/qwen25_7b_gsm8k.yaml", ""),
    "grpo": ("configs/grpo/qwen25_7b_gsm8k.yaml", ""),
    "rloo": ("configs/grpo/qwen25_7b_gsm8k.yaml", "lit_rl.methods.grpo.RLOO"),
    "reinforce_plus_plus": ("configs/grpo/qwen25_7b_gsm8k.yaml", "lit_rl.methods.grpo.ReinforcePP"),
}
"""The shipped run that comes nearest, and the method where it is not that run's own."""


def _targets(value: object) -> Settings:
    return {} if value in ("all-linear", None) else {f"{POLICY}.lora.targets": [value] if isinstance(value, str) else words(value)}


def _tested(value: object) -> Settings:
    return {"trainer.check_val_every_n_epoch": count(value)} if value != -1 else {"trainer.limit_val_batches": 0}


def _saved(value: object) -> Settings:
    return {"run.callbacks.newest.every_n_epochs": count(value)} if value != -1 else {}


SAMPLING, EVALUATION = f"{MODEL}.answers.sampling", f"{MODEL}.answers.eval_sampling"
KEYS: Keys = {
    "data.train_files": same("data.init_args.train", words),
    "data.val_files": same("data.init_args.val", words),
    "data.train_batch_size": same(f"{MODEL}.prompts_per_iteration", count),
    "data.max_prompt_length": same("data.init_args.max_prompt_length", count),
    "data.max_response_length": same(f"{SAMPLING}.max_new_tokens", count),
    "data.max_length": same("data.init_args.max_length", count),
    "data.prompt_key": same("data.init_args.prompt_key", words),
    "data.response_key": same("data.init_args.response_key", words),
    "data.filter_overlong_prompts": same("data.init_args.filter_overlong_prompts", switch),
    "data.truncation": same("data.init_args.truncation", one_of(("error", "left", "right", "middle"))),
    "data.gen_batch_size": same(f"{MODEL}.dynamic_sampling.prompts_per_generation", count),
    "data.seed": same("seed_everything"),
    "actor_rollout_ref.model.path": same(f"{POLICY}.pretrained", words),
    "model.path": same(f"{POLICY}.pretrained", words),
    "model.partial_pretrain": same(f"{POLICY}.pretrained", words),
    "actor_rollout_ref.model.enable_gradient_checkpointing": same(f"{POLICY}.gradient_checkpointing", switch),
    "model.enable_gradient_checkpointing": same(f"{POLICY}.gradient_checkpointing", switch),
    "actor_rollout_ref.model.use_remove_padding": same(f"{POLICY}.padding_free", switch),
    "model.lora_alpha": same(f"{POLICY}.lora.alpha"),
    "model.target_modules": _targets,
    f"{ACTOR}.optim.lr": same(f"{MODEL}.optimizer.init_args.lr"),
    "optim.lr": same(f"{MODEL}.optimizer.init_args.lr"),
    f"{ACTOR}.ppo_mini_batch_size": same(f"{MODEL}.prompts_per_update", count),
    f"{ACTOR}.ppo_max_token_len_per_gpu": same(f"{MODEL}.micro_batch_tokens", count),
    f"{ACTOR}.kl_loss_type": same(f"{MODEL}.kl.kind", one_of(DIVERGENCES)),
    f"{ACTOR}.entropy_coeff": same(f"{MODEL}.entropy_coef"),
    f"{ACTOR}.loss_agg_mode": same(f"{MODEL}.aggregation", one_of(AGGREGATIONS)),
    f"{ACTOR}.ppo_epochs": same(f"{MODEL}.inner_epochs", count),
    f"{ACTOR}.grad_clip": same("trainer.gradient_clip_val"),
    f"{ROLLOUT}.temperature": same(f"{SAMPLING}.temperature"),
    f"{ROLLOUT}.top_p": same(f"{SAMPLING}.top_p"),
    f"{ROLLOUT}.top_k": lambda value: {f"{SAMPLING}.top_k": max(0, whole(value))},
    f"{ROLLOUT}.val_kwargs.temperature": same(f"{EVALUATION}.temperature"),
    f"{ROLLOUT}.val_kwargs.top_p": same(f"{EVALUATION}.top_p"),
    f"{ROLLOUT}.mode": same(f"{MODEL}.answers.asynchronous", one_of({"sync": False, "async": False})),
    "algorithm.lam": same(f"{MODEL}.credit.lam"),
    "algorithm.beta": same(f"{MODEL}.beta"),
    "algorithm.loss_type": same(f"{MODEL}.loss_kind", one_of(("sigmoid", "hinge", "ipo"))),
    "algorithm.kl_penalty": same(f"{MODEL}.kl_in_reward.kind", one_of(DIVERGENCES)),
    "algorithm.kl_ctrl.target_kl": same(f"{MODEL}.kl_in_reward.target"),
    "algorithm.kl_ctrl.horizon": same(f"{MODEL}.kl_in_reward.horizon", count),
    "algorithm.filter_groups.metric": same(f"{MODEL}.dynamic_sampling.filter_metric", words),
    "algorithm.filter_groups.max_num_gen_batches": same(f"{MODEL}.dynamic_sampling.max_generations", count),
    "reward_model.overlong_buffer.len": same(f"{MODEL}.length_penalty.buffer", count),
    "reward_model.overlong_buffer.penalty_factor": same(f"{MODEL}.length_penalty.factor"),
    "critic.model.path": same(f"{MODEL}.critic.init_args.pretrained", words),
    "critic.optim.lr": same(f"{MODEL}.critic_training.lr"),
    "critic.cliprange_value": same(f"{MODEL}.critic_training.value_clip"),
    "trainer.critic_warmup": lambda value: {f"{MODEL}.critic_training.warmup": max(0, whole(value) - 1)},
    "trainer.n_gpus_per_node": same("trainer.devices", count),
    "trainer.nnodes": same("trainer.num_nodes", count),
    "trainer.save_freq": _saved,
    "trainer.test_freq": _tested,
    "trainer.experiment_name": same("run.name", words),
    "trainer.default_local_dir": same("run.dir", words),
}
"""One key by itself. Those that belong together are in `lit_rl.migrate.verl`."""

TOGETHER: Keys = {
    "model.lora_rank": checked(whole),
    "algorithm.adv_estimator": checked(text),
    "algorithm.gamma": checked(number),
    "algorithm.use_kl_in_reward": checked(switch),
    "algorithm.kl_ctrl.kl_coef": checked(number),
    "algorithm.norm_adv_by_std_in_grpo": checked(switch),
    "trainer.total_epochs": checked(count),
    "trainer.logger": checked(words),
    "trainer.project_name": checked(text),
    "reward_model.path": checked(text),
    "custom_reward_function.path": checked(text),
    "custom_reward_function.name": checked(text),
    f"{ACTOR}.use_kl_loss": checked(switch),
    f"{ACTOR}.kl_loss_coef": checked(number),
    f"{ACTOR}.ppo_micro_batch_size_per_gpu": checked(count),
    f"{ACTOR}.fsdp_config.param_offload": checked(switch),
    f"{ACTOR}.clip_ratio": checked(number),
    f"{ACTOR}.clip_ratio_low": checked(number),
    f"{ACTOR}.clip_ratio_high": checked(number),
    f"{ACTOR}.clip_ratio_c": checked(number),
    f"{ACTOR}.policy_loss.loss_mode": checked(text),
    f"{ROLLOUT}.n": checked(count),
    f"{ROLLOUT}.name": checked(text),
}
"""Keys that belong together with others, or that decide the class of a part."""

NOTHING = {
    "critic.ppo_mini_batch_size": "the critic learns in the policy's optimizer steps",
    f"{ROLLOUT}.tensor_model_parallel_size": "an option of a server: vllm serve MODEL --tensor-parallel-size N",
    f"{ROLLOUT}.gpu_memory_utilization": "an option of a server: vllm serve MODEL --gpu-memory-utilization F",
    f"{ROLLOUT}.disable_log_stats": "a vLLM server shows its own at /metrics, which deploy/prometheus.yml reads",
    f"{ROLLOUT}.prometheus.enable": "a vLLM server shows its own at /metrics, which deploy/prometheus.yml reads",
    "trainer.resume_mode": "--ckpt_path last continues exactly",
}
"""Keys without a key here, and why nothing is lost."""

REFUSED = {
    f"{ROLLOUT}.val_kwargs": "name its keys: temperature, top_p",
    "algorithm.rollout_correction": "write model.init_args.correction, whose options `python cli.py fit --model.help` lists",
}
"""Keys that cannot be read from a command line, and what to do."""


class _WithoutDates(yaml.SafeLoader):
    """YAML in which 2025-07-01 is a text, as Hydra has it."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, form) for tag, form in some if not tag.endswith(":timestamp")]
        for first, some in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def overrides(command: Sequence[str], *, place: str) -> Given:
    """Value by key of Hydra's overrides. Raises ConfigError for a word that is none, and for a key that verl does not have."""
    known, found = {*KEYS, *TOGETHER, *NOTHING, *REFUSED}, Given()
    for word in command:
        if word.startswith("~"):
            raise ConfigError(f"{place}: {word!r} deletes a key of verl's own defaults, which no run here has: leave it out")
        key, given, value = word.lstrip("+").partition("=")
        if not given:
            raise ConfigError(f"{place}: {word!r} is no KEY=VALUE")
        if key in REFUSED or any(key.startswith(f"{name}.") for name in REFUSED if key not in known):
            name = next(name for name in REFUSED if key.startswith(name))
            raise ConfigError(f"{place}: {key} is not taken over: {REFUSED[name]}")
        if key not in known:
            raise unknown("key", key, known, place=place)
        found[key] = literal(value)
    return found


def literal(text: str) -> object:
    """A value as Hydra reads it: numbers, True and False, null, lists, and text."""
    text = text.strip()
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            continue
    try:
        return yaml.load(text, Loader=_WithoutDates)
    except yaml.YAMLError:
        return text
