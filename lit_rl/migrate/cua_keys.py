"""Keys of the computer-use agent's YAML (`configs/cua_grpo.yaml` of AReaL's guide) and of a run's here.

docs/migration_agents.md has a row for each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import PurePosixPath

Settings = dict[str, object]
Given = Mapping[str, object]
"""Values by dotted key of their YAML; those that are not given are not in it."""

MODEL, POLICY = "model.init_args", "model.init_args.policy.init_args"
EPISODES, WORLDS = f"{MODEL}.episodes", f"{MODEL}.episodes.worlds.init_args"
ENGINE, SAMPLING = f"{MODEL}.answers.engine.init_args", f"{MODEL}.answers.sampling"
NEWEST = "run.callbacks.newest"
LOCAL = ("http://localhost:8000", "http://localhost:8000/v1")
"""The guide's own address of vLLM, which is the default here."""
PRECISIONS = {"bf16": "bf16-mixed", "bfloat16": "bf16-mixed", "fp32": "32-true", "float32": "32-true", "no": "32-true"}
SHARDING = {"FULL_SHARD": "fsdp", "SHARD_GRAD_OP": "deepspeed_zero2", "NO_SHARD": "ddp"}
"""Base config by FSDP's strategy."""


def number(value: object) -> float | int:
    """The value as a number; YAML reads 1e-5 as a text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("a number")
    try:
        return value if isinstance(value, int | float) else float(value)
    except ValueError as error:
        raise ValueError("a number") from error


def count(value: object) -> int:
    """The value as a positive whole number."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError("a positive whole number")
    return value


def switch(value: object) -> bool:
    """The value as true or false."""
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def text(value: object) -> str:
    """The value as a text."""
    if not isinstance(value, str):
        raise ValueError("a text")
    return value


def same(key: str, convert: Callable[[object], object]) -> Callable[[object], Settings]:
    """One key is one key."""
    return lambda value: {key: convert(value)}


def one_of(values: Mapping[str, object], key: str = "") -> Callable[[object], Settings]:
    """One of a few words, as the value of a key or for `together` to read."""

    def made(value: object) -> Settings:
        if value not in values:
            raise ValueError(f"one of {', '.join(values)}")
        return {key: values[str(value)]} if key else {}

    return made


def checked(convert: Callable[[object], object]) -> Callable[[object], Settings]:
    """A value that `lit_rl.migrate.cua` reads together with others."""

    def made(value: object) -> Settings:
        convert(value)
        return {}

    return made


def only(wanted: object, why: str) -> Callable[[object], Settings]:
    """The one value that can be had."""

    def made(value: object) -> Settings:
        if value != wanted:
            raise ValueError(f"{'true' if wanted is True else 'false' if wanted is False else wanted}: {why}")
        return {}

    return made


def _targets(value: object) -> Settings:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError("a list of names of modules")
    return {f"{POLICY}.lora.targets": value}


def _warmup(value: object) -> Settings:
    if value == 0:
        return {f"{MODEL}.lr_scheduler": None}
    return {f"{MODEL}.lr_scheduler.init_args.warmup_steps": count(value)}


def _folder(value: object) -> Settings:
    path = PurePosixPath(text(value))
    return {"run.dir": str(path.parent), "run.name": path.name}


def _address(value: object) -> Settings:
    return {} if text(value).rstrip("/") in LOCAL else {f"{ENGINE}.urls": value}


def _clipped(value: object) -> Settings:
    return {} if isinstance(value, bool) else {"trainer.gradient_clip_val": number(value)}


def _metric(value: object) -> Settings:
    if value not in METRICS:
        raise ValueError(f"one of {', '.join(METRICS)}, which an evaluation tells")
    return {}


METRICS = {"eval/accuracy": "val/accuracy", "eval/reward": "val/reward", "eval/turns": "val/turns"}
KEYS: Mapping[str, Callable[[object], Settings]] = {
    "model.name": same(f"{POLICY}.pretrained", text),
    "model.torch_dtype": one_of({"bfloat16": "bfloat16", "float16": "float16", "float32": "float32"}, f"{POLICY}.dtype"),
    "model.max_seq_length": same(f"{MODEL}.micro_batch_tokens", count),
    "model.use_lora": lambda value: {} if switch(value) else {f"{POLICY}.lora": None, f"{POLICY}.keep_reference": True},
    "model.lora.r": same(f"{POLICY}.lora.rank", count),
    "model.lora.alpha": same(f"{POLICY}.lora.alpha", number),
    "model.lora.dropout": only(0, "with dropout the policy that trains is not the one that acted; only supervised fine-tuning has it"),
    "model.lora.target_modules": _targets,
    "model.lora.bias": only("none", "adapters here train no biases"),
    "training.learning_rate": same(f"{MODEL}.optimizer.init_args.lr", number),
    "training.weight_decay": same(f"{MODEL}.optimizer.init_args.weight_decay", number),
    "training.max_grad_norm": same("trainer.gradient_clip_val", number),
    "training.max_steps": same("trainer.max_epochs", count),
    "training.warmup_steps": _warmup,
    "training.eval_steps": same("trainer.check_val_every_n_epoch", count),
    "training.save_steps": same(f"{NEWEST}.every_n_epochs", count),
    "training.save_total_limit": same(f"{NEWEST}.save_top_k", count),
    "training.metric_for_best_model": _metric,
    "training.output_dir": _folder,
    "training.seed": same("seed_everything", number),
    "grpo.beta": same(f"{MODEL}.kl.coef", number),
    "grpo.clip_epsilon": lambda value: {f"{MODEL}.surrogate.init_args.{side}": number(value) for side in ("low", "high")},
    "grpo.min_group_std": same(f"{MODEL}.credit.init_args.min_std", number),
    "grpo.advantage_normalization": same(f"{MODEL}.credit.init_args.std", switch),
    "rollout.num_rollouts": same(f"{MODEL}.group_size", count),
    "rollout.max_turns": same(f"{EPISODES}.manner.max_turns", count),
    "rollout.concurrency": same(f"{EPISODES}.concurrency", count),
    "rollout.enable_temperature_variation": checked(switch),
    "rollout.base_temperature": checked(number),
    "rollout.temperature_increment": checked(number),
    "rollout.action_delay": same(f"{EPISODES}.manner.action_delay_s", lambda value: float(number(value))),
    "rollout.screenshot_delay": same(f"{WORLDS}.screenshot_delay", lambda value: float(number(value))),
    "rollout.gbox.box_type": one_of({"android": "android", "linux": "linux"}, f"{WORLDS}.box_type"),
    "rollout.gbox.timeout": same(f"{WORLDS}.create_timeout", text),
    "rollout.gbox.expires_in": same(f"{WORLDS}.expires_in", text),
    "inference.backend": one_of({"vllm": "openai", "sglang": "sglang"}, f"{ENGINE}.dialect"),
    "inference.vllm.api_base": _address,
    "inference.vllm.max_tokens": same(f"{SAMPLING}.max_new_tokens", count),
    "inference.vllm.temperature": same(f"{SAMPLING}.temperature", lambda value: float(number(value))),
    "inference.vllm.timeout": same(f"{ENGINE}.timeout_s", lambda value: float(number(value))),
    "distributed.backend": one_of({"fsdp": "fsdp", "ddp": "ddp"}),
    "distributed.fsdp.sharding_strategy": one_of(SHARDING),
    "distributed.fsdp.mixed_precision": one_of(PRECISIONS, "trainer.precision"),
    "distributed.fsdp.gradient_clipping": _clipped,
    "checkpoint.ignore_data_skip": only(False, "a run that is continued goes on with the tasks where it stopped"),
}
"""One key by itself, or looked at by itself. Those that belong together are in `lit_rl.migrate.cua`."""

NOTHING = {
    "model.trust_remote_code": "the models are those of transformers, and no code of a repository is executed",
    "model.lora.task_type": "the policy knows what it is",
    "training.gradient_accumulation_steps": "model.init_args.micro_batch_tokens cuts a step, which is of all episodes either way",
    "training.load_best_model_at_end": "best_model/ holds the best weights, the checkpoints the newest",
    "rollout.async_mode": "episodes run at once; training waits for them, and so is on-policy",
    "rollout.interruptible": "an iteration waits for its episodes, each of which has limits of time",
    "rollout.max_staleness": "no episode is older than its iteration, so any limit is kept",
}
"""Keys without one here, and why nothing is lost."""

TOGETHER = {
    "training.batch_size": "tasks on each GPU: model.init_args.prompts_per_iteration is this times --gpus",
    "training.greater_is_better": "mode of callbacks.best_model.BestModel and EarlyStopping",
    "training.early_stopping_patience": "patience of EarlyStopping, in evaluations",
    "training.target_accuracy": "stopping_threshold of EarlyStopping",
    "inference.vllm.max_retries": "model.init_args.answers.engine.init_args.deadline_s: the timeout of all tries together",
    "inference.vllm.top_p": "log-probabilities of a cut distribution are not those that training computes: all tokens are drawn from",
    "distributed.fsdp.cpu_offload": "configs/base/deepspeed_zero3_offload.yaml",
    "logging.level": "level of callbacks.agent_logs.AgentLogs",
    "logging.log_to_file": "training of callbacks.agent_logs.AgentLogs",
    "logging.log_file": "training of callbacks.agent_logs.AgentLogs, a name in logs of the run's folder",
    "logging.enable_detailed_logging": "rollouts of callbacks.agent_logs.AgentLogs",
    "logging.detailed_log_file": "rollouts of callbacks.agent_logs.AgentLogs, a name in logs of the run's folder",
    "monitoring.enable_wandb": "trainer.logger",
    "monitoring.wandb_project": "project of callbacks.trackers.WandB in trainer.logger",
    "monitoring.wandb_entity": "entity of callbacks.trackers.WandB in trainer.logger",
    "monitoring.enable_tensorboard": "trainer.logger",
    "checkpoint.resume_from_checkpoint": "--ckpt_path, on the command line",
}
"""Keys that several of ours, a list of classes or the command line decide."""
