"""Keys of verl's configuration and keys of a run's YAML. docs/migration_llm.md has a row for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import yaml

from lit_rl.errors import ConfigError
from lit_rl.migrate.migrated import unknown

Settings = dict[str, object]
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


def number(value: object) -> float | int:
    """A number; raises ValueError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("a number")
    return value


def whole(value: object) -> int:
    """A whole number from 1 on; raises ValueError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError("a whole number from 1 on")
    return value


def flag(value: object) -> bool:
    """True or False; raises ValueError for anything else."""
    if not isinstance(value, bool):
        raise ValueError("True or False")
    return value


def words(value: object) -> str | list[str]:
    """A text, or a list of them; raises ValueError for anything else."""
    if isinstance(value, list) and value and all(isinstance(part, str) for part in value):
        return list(value)
    if not isinstance(value, str) or not value:
        raise ValueError("a text, or a list of texts")
    return value


def same(key: str, convert: Callable[[object], object] = number) -> Callable[[object], Settings]:
    """One key is one key."""
    return lambda value: {key: convert(value)}


def choice(key: str, values: Mapping[str, object]) -> Callable[[object], Settings]:
    """One of a few words."""

    def made(value: object) -> Settings:
        if value not in values:
            raise ValueError(f"one of {', '.join(values)}")
        return {key: values[str(value)]}

    return made


def _targets(value: object) -> Settings:
    return {} if value in ("all-linear", None) else {f"{POLICY}.lora.targets": [value] if isinstance(value, str) else words(value)}


def _tested(value: object) -> Settings:
    return {"trainer.check_val_every_n_epoch": whole(value)} if value != -1 else {"trainer.limit_val_batches": 0}


def _saved(value: object) -> Settings:
    return {"run.callbacks.newest.every_n_epochs": whole(value)} if value != -1 else {}


SAMPLING, EVALUATION = f"{MODEL}.answers.sampling", f"{MODEL}.answers.eval_sampling"
KEYS: Mapping[str, Callable[[object], Settings]] = {
    "data.train_files": same("data.init_args.train", words),
    "data.val_files": same("data.init_args.val", words),
    "data.train_batch_size": same(f"{MODEL}.prompts_per_iteration", whole),
    "data.max_prompt_length": same("data.init_args.max_prompt_length", whole),
    "data.max_response_length": same(f"{SAMPLING}.max_new_tokens", whole),
    "data.max_length": same("data.init_args.max_length", whole),
    "data.prompt_key": same("data.init_args.prompt_key", words),
    "data.response_key": same("data.init_args.response_key", words),
    "data.filter_overlong_prompts": same("data.init_args.filter_overlong_prompts", flag),
    "data.truncation": choice("data.init_args.truncation", {word: word for word in ("error", "left", "right", "middle")}),
    "data.gen_batch_size": same(f"{MODEL}.dynamic_sampling.prompts_per_generation", whole),
    "data.seed": same("seed_everything"),
    "actor_rollout_ref.model.path": same(f"{POLICY}.pretrained", words),
    "model.path": same(f"{POLICY}.pretrained", words),
    "model.partial_pretrain": same(f"{POLICY}.pretrained", words),
    "actor_rollout_ref.model.enable_gradient_checkpointing": same(f"{POLICY}.gradient_checkpointing", flag),
    "model.enable_gradient_checkpointing": same(f"{POLICY}.gradient_checkpointing", flag),
    "actor_rollout_ref.model.use_remove_padding": same(f"{POLICY}.padding_free", flag),
    "model.lora_alpha": same(f"{POLICY}.lora.alpha"),
    "model.target_modules": _targets,
    f"{ACTOR}.optim.lr": same(f"{MODEL}.optimizer.init_args.lr"),
    "optim.lr": same(f"{MODEL}.optimizer.init_args.lr"),
    f"{ACTOR}.ppo_mini_batch_size": same(f"{MODEL}.prompts_per_update", whole),
    f"{ACTOR}.ppo_max_token_len_per_gpu": same(f"{MODEL}.micro_batch_tokens", whole),
    f"{ACTOR}.kl_loss_type": choice(f"{MODEL}.kl.kind", DIVERGENCES),
    f"{ACTOR}.entropy_coeff": same(f"{MODEL}.entropy_coef"),
    f"{ACTOR}.loss_agg_mode": choice(f"{MODEL}.aggregation", {word: word for word in AGGREGATIONS}),
    f"{ACTOR}.ppo_epochs": same(f"{MODEL}.inner_epochs", whole),
    f"{ACTOR}.grad_clip": same("trainer.gradient_clip_val"),
    f"{ROLLOUT}.temperature": same(f"{SAMPLING}.temperature"),
    f"{ROLLOUT}.top_p": same(f"{SAMPLING}.top_p"),
    f"{ROLLOUT}.top_k": lambda value: {f"{SAMPLING}.top_k": max(0, int(number(value)))},
    f"{ROLLOUT}.val_kwargs.temperature": same(f"{EVALUATION}.temperature"),
    f"{ROLLOUT}.val_kwargs.top_p": same(f"{EVALUATION}.top_p"),
    f"{ROLLOUT}.mode": choice(f"{MODEL}.answers.asynchronous", {"sync": False, "async": False}),
    "algorithm.lam": same(f"{MODEL}.credit.lam"),
    "algorithm.beta": same(f"{MODEL}.beta"),
    "algorithm.loss_type": choice(f"{MODEL}.loss_kind", {word: word for word in ("sigmoid", "hinge", "ipo")}),
    "algorithm.kl_penalty": choice(f"{MODEL}.kl_in_reward.kind", DIVERGENCES),
    "algorithm.kl_ctrl.target_kl": same(f"{MODEL}.kl_in_reward.target"),
    "algorithm.kl_ctrl.horizon": same(f"{MODEL}.kl_in_reward.horizon", whole),
    "algorithm.filter_groups.metric": same(f"{MODEL}.dynamic_sampling.filter_metric", words),
    "algorithm.filter_groups.max_num_gen_batches": same(f"{MODEL}.dynamic_sampling.max_generations", whole),
    "reward_model.overlong_buffer.len": same(f"{MODEL}.length_penalty.buffer", whole),
    "reward_model.overlong_buffer.penalty_factor": same(f"{MODEL}.length_penalty.factor"),
    "critic.model.path": same(f"{MODEL}.critic.init_args.pretrained", words),
    "critic.optim.lr": same(f"{MODEL}.critic_training.lr"),
    "critic.cliprange_value": same(f"{MODEL}.critic_training.value_clip"),
    "trainer.critic_warmup": lambda value: {f"{MODEL}.critic_training.warmup": max(0, int(number(value)) - 1)},
    "trainer.n_gpus_per_node": same("trainer.devices", whole),
    "trainer.nnodes": same("trainer.num_nodes", whole),
    "trainer.save_freq": _saved,
    "trainer.test_freq": _tested,
    "trainer.experiment_name": same("run.name", words),
    "trainer.default_local_dir": same("run.dir", words),
}
"""One key by itself. Those that belong together are in `lit_rl.migrate.verl`."""

TOGETHER = {
    "model.lora_rank", "algorithm.adv_estimator", "algorithm.gamma", "algorithm.use_kl_in_reward", "algorithm.kl_ctrl.kl_coef",
    "algorithm.norm_adv_by_std_in_grpo", "trainer.total_epochs", "trainer.logger", "trainer.project_name", "reward_model.path",
    "custom_reward_function.path", "custom_reward_function.name", f"{ACTOR}.use_kl_loss", f"{ACTOR}.kl_loss_coef",
    f"{ACTOR}.ppo_micro_batch_size_per_gpu", f"{ACTOR}.fsdp_config.param_offload", f"{ACTOR}.clip_ratio", f"{ACTOR}.clip_ratio_low",
    f"{ACTOR}.clip_ratio_high", f"{ACTOR}.clip_ratio_c", f"{ACTOR}.policy_loss.loss_mode", f"{ROLLOUT}.n", f"{ROLLOUT}.name",
}  # fmt: skip

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


def overrides(words: Sequence[str], *, place: str) -> Given:
    """Value by key of Hydra's overrides. Raises ConfigError for a word that is none, and for a key that verl does not have."""
    known, found = {*KEYS, *TOGETHER, *NOTHING, *REFUSED}, Given()
    for word in words:
        key, given, text = word.lstrip("+").partition("=")
        if not given or word.startswith("~"):
            raise ConfigError(f"{place}: {word!r} is no KEY=VALUE")
        if key in REFUSED or any(key.startswith(f"{name}.") for name in REFUSED if key not in known):
            name = next(name for name in REFUSED if key.startswith(name))
            raise ConfigError(f"{place}: {key} is not taken over: {REFUSED[name]}")
        if key not in known:
            raise unknown("key", key, known, place=place)
        found[key] = literal(text)
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
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text
