"""The computer-use agent of AReaL's guide (rl-cua): its training YAML."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import yaml

from lit_rl.errors import ConfigError
from lit_rl.migrate.cua_keys import (
    ENGINE,
    EPISODES,
    KEYS,
    LOCAL,
    METRICS,
    MODEL,
    NOTHING,
    POLICY,
    SAMPLING,
    SHARDING,
    TOGETHER,
    Given,
)
from lit_rl.migrate.migrated import Migrated, unknown
from lit_rl.migrate.values import Settings, count, number, real, switch, text, whole

CONFIG = "configs/agent/cua_grpo.yaml"
VARIATION = {"base_temperature": 0.6, "temperature_increment": 0.1}
"""Their defaults."""
BEST = {"training.metric_for_best_model", "training.greater_is_better", "training.early_stopping_patience", "training.target_accuracy"}
WITHOUT_TOP_P = "log-probabilities of a cut distribution are not those that training computes: all tokens are drawn from"
OF_CALLBACKS = BEST | {"training.save_total_limit", *(key for key in TOGETHER if key.startswith("logging."))}
"""Keys that stand in the list of callbacks, which a YAML can only replace as a whole."""


def migrate(file: Path, *, gpus: int | None) -> Migrated:
    """Read a YAML of theirs. gpus: Those that train. Raises ConfigError that names file, line, key and what to do."""
    if gpus is None or gpus < 1:
        raise ConfigError("--gpus N is missing: batch_size of that YAML counts tasks per GPU, so the GPUs that train must be known")
    if not file.is_file():
        raise ConfigError(f"no such file: {file}")
    try:
        root = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"{file}: this is no run: its keys are model, training, grpo, rollout, inference, ...")
        found = {key: (value, line) for key, value, line in leaves(root, file) if value not in (None, "")}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: this is not YAML: {' '.join(str(error).split())}") from error
    values, lines = ({key: pair[i] for key, pair in found.items()} for i in (0, 1))
    try:
        return migrate_keys(values, gpus=gpus, told=lambda key: f"{file}:{lines[key]}: {key}: {values[key]}")
    except ValueError as error:
        raise ConfigError(f"{file}: {error}") from error


def leaves(node: yaml.MappingNode, file: Path, above: str = "") -> Iterator[tuple[str, object, int]]:
    """Dotted key, value and line of each single value or list. Raises ConfigError for a key that they do not have."""
    known = {*KEYS, *NOTHING, *TOGETHER}
    for name, value in node.value:
        key, line = f"{above}{name.value}", name.start_mark.line + 1
        if key in known:
            yield key, yaml.SafeLoader("").construct_object(value, deep=True), line
        elif isinstance(value, yaml.MappingNode) and any(one.startswith(f"{key}.") for one in known):
            yield from leaves(value, file, f"{key}.")
        else:
            raise unknown("key", key, known, place=f"{file}:{line}")


def migrate_keys(given: Given, *, gpus: int, told: Callable[[str], str]) -> Migrated:
    """The run of their keys. told: begins the sentence about a key's value. Raises ValueError for values that exclude each other."""
    made = Migrated(bases=[f"configs/base/{_strategy(given)}.yaml", CONFIG])
    made.settings = {"trainer.devices": gpus}
    made.take({**KEYS, **TOGETHER}, given, told=told)
    made.note(NOTHING, given)
    made.settings |= _together(given, gpus)
    if made.settings.get(f"{POLICY}.lora", "") is None:
        made.settings = {key: value for key, value in made.settings.items() if not key.startswith(f"{POLICY}.lora.")}
    made.notes += _notes(given)
    return made


def _strategy(given: Given) -> str:
    if given.get("distributed.fsdp.cpu_offload") is True:
        return "deepspeed_zero3_offload"
    if given.get("distributed.backend") == "ddp":
        return "ddp"
    return SHARDING.get(str(given.get("distributed.fsdp.sharding_strategy")), "fsdp")


def _together(given: Given, gpus: int) -> Settings:
    """Keys that several of theirs decide. Raises ValueError with the key in front."""
    found: Settings = {}
    if "training.batch_size" in given:
        found[f"{MODEL}.prompts_per_iteration"] = count(given["training.batch_size"]) * gpus
    if {"model.max_seq_length", "inference.vllm.max_tokens"} & given.keys():
        length, answer = count(given.get("model.max_seq_length", 16384)), count(given.get("inference.vllm.max_tokens", 2048))
        if length <= answer:
            raise ValueError(f"model.max_seq_length: {length}: it leaves no room for a prompt beside inference.vllm.max_tokens: {answer}")
        found[f"{EPISODES}.manner.max_prompt_tokens"] = length - answer
    if {"inference.vllm.timeout", "inference.vllm.max_retries"} & given.keys():
        seconds = real(given.get("inference.vllm.timeout", 120.0)) * (1 + whole(given.get("inference.vllm.max_retries", 3)))
        found |= {f"{ENGINE}.deadline_s": seconds, f"{EPISODES}.manner.turn_s": seconds}
    if switch(given.get("rollout.enable_temperature_variation", False)):
        base, step = (real(given.get(f"rollout.{key}", usual)) for key, usual in VARIATION.items())
        found |= {f"{SAMPLING}.temperature": base, f"{MODEL}.temperature_increment": step}
    if OF_CALLBACKS & given.keys():
        found["trainer.callbacks"] = _callbacks(given)
    if any(key.startswith("monitoring.") for key in given):
        found["trainer.logger"] = _loggers(given) or False
    return found


def _callbacks(given: Given) -> list[object]:
    """The list of the config, with their values in it."""
    monitor = METRICS.get(str(given.get("training.metric_for_best_model", "eval/accuracy")), "val/accuracy")
    mode = "max" if switch(given.get("training.greater_is_better", True)) else "min"
    keep = count(given.get("training.save_total_limit", 5))
    early: Settings = {"monitor": monitor, "mode": mode, "patience": count(given.get("training.early_stopping_patience", 5))}
    if monitor == "val/accuracy":
        early["stopping_threshold"] = number(given.get("training.target_accuracy", 0.9))
    return [
        {"class_path": "callbacks.agent_logs.AgentLogs", "init_args": _logs(given)},
        {"class_path": "callbacks.episode_records.EpisodeRecords"},
        {"class_path": "callbacks.export.Export", "init_args": {"at": "checkpoint", "keep": keep}},
        {"class_path": "callbacks.best_model.BestModel", "init_args": {"monitor": monitor, "mode": mode}},
        {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": early | {"check_on_train_epoch_end": False}},
    ]


def _logs(given: Given) -> Settings:
    names = {}
    for name, told, file in (("training", "log_to_file", "log_file"), ("rollouts", "enable_detailed_logging", "detailed_log_file")):
        named = PurePosixPath(text(given.get(f"logging.{file}", f"{name}.log"))).name
        names[name] = named if switch(given.get(f"logging.{told}", True)) else None
    return {"level": text(given.get("logging.level", "INFO")).upper(), **names}


def _loggers(given: Given) -> list[object]:
    found: list[object] = []
    if switch(given.get("monitoring.enable_wandb", False)):
        named = {name: given[f"monitoring.wandb_{name}"] for name in ("project", "entity") if f"monitoring.wandb_{name}" in given}
        found.append({"class_path": "callbacks.trackers.WandB", "init_args": named})
    if switch(given.get("monitoring.enable_tensorboard", True)):
        output = text(given.get("training.output_dir", "outputs/grpo_cua"))
        found.append(
            {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": {"save_dir": output, "name": "logs", "version": ""}}
        )
    return found


def _notes(given: Given) -> Iterator[str]:
    """Sentences about what a person has to know or do."""
    top_p, address = given.get("inference.vllm.top_p", 1), given.get("inference.vllm.api_base")
    if top_p != 1:
        yield f"inference.vllm.top_p: {top_p} is left out: {WITHOUT_TOP_P}"
    if isinstance(address, str) and address.rstrip("/") in LOCAL:
        yield "inference.vllm.api_base: it is the default here, so that VLLM_API_BASE of the environment or of .env comes before it"
    elif address is not None:
        yield "inference.vllm.api_base: an address in a YAML comes before VLLM_API_BASE"
    if (folder := given.get("checkpoint.resume_from_checkpoint")) is not None:
        yield f"checkpoint.resume_from_checkpoint: continue with --ckpt_path {folder}"
    if given.get("monitoring.enable_wandb") is True:
        yield "monitoring.enable_wandb: W&B is offline unless WANDB_MODE=online is in the environment or in .env"
    rank = given.get("model.lora.r", 16)
    yield f"vLLM: scripts/run_vllm_base.sh, or docker/docker_train_areal.sh for all; its --max-lora-rank must be at least {rank}"
