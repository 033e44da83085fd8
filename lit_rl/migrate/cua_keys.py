"""Keys of the computer-use agent's YAML (`configs/cua_grpo.yaml` of AReaL's guide) and of a run's here.

docs/migration_agents.md has a row for each.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath

from lit_rl.migrate.values import Keys, Settings, checked, count, names, number, one_of, only, real, same, switch, text, whole

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


METRICS = {"eval/accuracy": "val/accuracy", "eval/reward": "val/reward", "eval/turns": "val/turns"}
KEYS: Keys = {
    "model.name": same(f"{POLICY}.pretrained", text),
    "model.torch_dtype": same(f"{POLICY}.dtype", one_of(("bfloat16", "float16", "float32"))),
    "model.max_seq_length": same(f"{MODEL}.micro_batch_tokens", count),
    "model.use_lora": lambda value: {} if switch(value) else {f"{POLICY}.lora": None, f"{POLICY}.keep_reference": True},
    "model.lora.r": same(f"{POLICY}.lora.rank", count),
    "model.lora.alpha": same(f"{POLICY}.lora.alpha", number),
    "model.lora.dropout": only(0, "with dropout the policy that trains is not the one that acted; only supervised fine-tuning has it"),
    "model.lora.target_modules": same(f"{POLICY}.lora.targets", names),
    "model.lora.bias": only("none", "adapters here train no biases"),
    "training.learning_rate": same(f"{MODEL}.optimizer.init_args.lr", number),
    "training.weight_decay": same(f"{MODEL}.optimizer.init_args.weight_decay", number),
    "training.max_grad_norm": same("trainer.gradient_clip_val", number),
    "training.max_steps": same("trainer.max_epochs", count),
    "training.warmup_steps": _warmup,
    "training.eval_steps": same("trainer.check_val_every_n_epoch", count),
    "training.save_steps": same(f"{NEWEST}.every_n_epochs", count),
    "training.save_total_limit": same(f"{NEWEST}.save_top_k", count),
    "training.metric_for_best_model": checked(one_of(METRICS)),
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
    "rollout.action_delay": same(f"{EPISODES}.manner.action_delay_s", real),
    "rollout.screenshot_delay": same(f"{WORLDS}.screenshot_delay", real),
    "rollout.gbox.box_type": same(f"{WORLDS}.box_type", one_of(("android", "linux"))),
    "rollout.gbox.timeout": same(f"{WORLDS}.create_timeout", text),
    "rollout.gbox.expires_in": same(f"{WORLDS}.expires_in", text),
    "inference.backend": same(f"{ENGINE}.dialect", one_of({"vllm": "openai", "sglang": "sglang"})),
    "inference.vllm.api_base": _address,
    "inference.vllm.max_tokens": same(f"{SAMPLING}.max_new_tokens", count),
    "inference.vllm.temperature": same(f"{SAMPLING}.temperature", real),
    "inference.vllm.timeout": same(f"{ENGINE}.timeout_s", real),
    "distributed.backend": checked(one_of(("fsdp", "ddp"))),
    "distributed.fsdp.sharding_strategy": checked(one_of(SHARDING)),
    "distributed.fsdp.mixed_precision": same("trainer.precision", one_of(PRECISIONS)),
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

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


def _level(value: object) -> object:
    return one_of(LEVELS)(value.upper() if isinstance(value, str) else value)


TOGETHER: Keys = {
    "training.batch_size": checked(count),
    "training.greater_is_better": checked(switch),
    "training.early_stopping_patience": checked(count),
    "training.target_accuracy": checked(number),
    "inference.vllm.max_retries": checked(whole),
    "inference.vllm.top_p": checked(number),
    "distributed.fsdp.cpu_offload": checked(switch),
    "logging.level": checked(_level),
    "logging.log_to_file": checked(switch),
    "logging.log_file": checked(text),
    "logging.enable_detailed_logging": checked(switch),
    "logging.detailed_log_file": checked(text),
    "monitoring.enable_wandb": checked(switch),
    "monitoring.wandb_project": checked(text),
    "monitoring.wandb_entity": checked(text),
    "monitoring.enable_tensorboard": checked(switch),
    "checkpoint.resume_from_checkpoint": checked(text),
}
"""Keys that several of ours, a list of classes or the command line decide: `lit_rl.migrate.cua` reads them together."""
