"""DeepGen-RL (deepgenteam/deepgen_rl): launch scripts, YAMLs of training and evaluation data, SFT-aux configurations."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from lit_rl.errors import ConfigError
from lit_rl.migrate.deepgen_data import migrate_python, migrate_yaml
from lit_rl.migrate.deepgen_flags import (
    BASES,
    COUNTS,
    DEEPSPEED,
    FLAGS,
    MODEL,
    NOTHING,
    OTHERS,
    REMOVED,
    SCRIPT_VARIABLES,
    accumulation,
    together,
)
from lit_rl.migrate.migrated import Migrated, unknown
from lit_rl.migrate.shell import command_options
from lit_rl.migrate.values import number
from lit_rl.net.environment import VARIABLES

PROGRAM = "deepgen_rl.grpo_deepgen"
RANGES: Mapping[str, tuple[Callable[[float], bool], str]] = {
    "timestep_fraction": (lambda value: 0 < value <= 1, "must be in (0, 1], got"),
    "clip_range": (lambda value: value >= 0, "must be non-negative, got"),
    "ema_diffusion": (lambda value: 0 <= value < 1, "must be in [0, 1). Use 0 to disable, got"),
    "sftaux_coef": (lambda value: 0 <= value <= 1, "must be in [0, 1], got"),
    "sftaux_every_n_steps": (lambda value: value > 0, "must be positive, got"),
    "sftaux_micro_batch_size": (lambda value: value > 0, "must be positive, got"),
    "sftaux_num_workers": (lambda value: value >= 0, "must be >= 0, got"),
    "log_tflops_every": (lambda value: value > 0, "must be positive, got"),
}
"""Options whose values their trainer checks, and its sentences."""
READ_HERE = {variable.name for variable in VARIABLES} | {"UNIGENBENCH_MODEL_NAME", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "DATA_ROOT"}
"""Variables of theirs that have the same meaning here."""
QUIET = {"rollout_global_batch_size", "atrain_global_batch_size", "image_height", "image_width", "atrain_kl_type"}
"""Options that `together` has made keys of."""
DEFAULTS = {"lr_scheduler_type": "constant", "report_to": "wandb"}
"""Defaults of the trainer that are not those of its launch script, which configs/deepgen has."""


def migrate(file: Path) -> Migrated:
    """Read a .sh, .yaml or .py of DeepGen-RL. Raises ConfigError that names file, key and what to do."""
    if not file.is_file():
        raise ConfigError(f"no such file: {file}")
    if file.suffix == ".sh":
        options, variables = command_options(file, PROGRAM)
        counts = [variables.get(name, "") for name in ("NGPUS", "NNODES")]
        gpus = int(counts[0]) * int(counts[1] or 1) if counts[0].isdecimal() and (counts[1] or "1").isdecimal() else None
        return migrate_options(options, place=str(file), processes=gpus, variables=variables)
    if file.suffix in (".yaml", ".yml"):
        return migrate_yaml(file)
    if file.suffix == ".py":
        return migrate_python(file)
    raise ConfigError(
        f"{file}: DeepGen-RL has launch scripts (.sh), data files (.yaml) and SFT-aux configurations (.py); {file.suffix} is none"
    )


def migrate_options(
    options: Mapping[str, str | None], *, place: str, processes: int | None = None, variables: Mapping[str, str] = MappingProxyType({})
) -> Migrated:
    """The run of a command line.

    options: Value by name; None where only running the script would tell it. processes: GPUs, where known. variables: Those that the script
    sets.
    """
    made = Migrated()
    for name in options:
        check_name(name, place=place)
    given = DEFAULTS | {name: value for name, value in options.items() if value is not None}
    if {"dataset_config", "prompts_file"} <= given.keys():
        del given["prompts_file"]
        made.notes.append("--prompts_file: of no effect beside --dataset_config")
    made.notes += [f"--{name}: its value is not in the script, and is left out" for name, value in options.items() if value is None]
    for name, value in given.items():
        check_value(name, value, place=place)
    algorithm = given.get("atrain_algorithm", "flowgrpo")
    made.bases = [_strategy(given), f"configs/deepgen/{BASES[algorithm]}.yaml"]
    for keys in (COUNTS, FLAGS):
        made.take(keys, given, told=lambda name: f"{place}: --{name} {given[name]}")
    made.note({f"--{name}": why for name, why in {**NOTHING, **OTHERS}.items() if name not in QUIET}, [f"--{name}" for name in given])
    made.settings |= together(given, algorithm)
    for name, (readers, made_of) in SCRIPT_VARIABLES.items():
        if name in variables and algorithm in readers:
            made.take({name: made_of}, variables, told=lambda name: f"{place}: {name}={variables[name]}")
    if ours := [f"{name}={shlex.quote(value)}" for name, value in variables.items() if name in READ_HERE and value]:
        made.notes.append(f"Variables that the script sets and a run here reads; export those that you do not: {' '.join(ours)}")
    if processes is not None:
        images, micro = int(given.get("atrain_global_batch_size", "256")), int(given.get("atrain_micro_batch_size", "32"))
        if {"sftaux_micro_batch_size"} & given.keys() and made.settings.get(f"{MODEL}.supervised", "") is not None:
            made.settings[f"{MODEL}.supervised.batch_size"] = int(given["sftaux_micro_batch_size"]) * processes
        parts = accumulation(images=images, micro=micro, processes=processes)
        made.notes.append(f"On {processes} GPUs: {parts} micro-batches of {micro} images for each trained step.")
    _consistent(made, algorithm)
    return made


def check_name(name: str, *, place: str) -> None:
    """Raise ConfigError for an option that the trainer does not have, or that it has lost."""
    if name in REMOVED:
        raise ConfigError(f"{place}: --{name} is refused by DeepGen-RL itself: set --{REMOVED[name].replace(' and ', ' and --')}")
    if name not in (known := {*FLAGS, *NOTHING, *OTHERS}):
        raise unknown("option", f"--{name}", {f"--{option}" for option in known}, place=place)


def check_value(name: str, value: str, *, place: str) -> None:
    """Raise ConfigError for a value that the trainer refuses, with its own sentence."""
    if name in RANGES:
        allowed, sentence = RANGES[name]
        try:
            fits = allowed(float(value))
        except ValueError as error:
            raise ConfigError(f"{place}: --{name} must be a number, got {value}") from error
        if not fits:
            raise ConfigError(f"{place}: --{name} {sentence} {number(value)}")


def _strategy(given: Mapping[str, str]) -> str:
    name = Path(given.get("deepspeed", "")).name
    return f"configs/base/deepspeed_{name.removesuffix('.json')}.yaml" if name in DEEPSPEED else "configs/base/ddp.yaml"


def _consistent(made: Migrated, algorithm: str) -> None:
    """Drop keys that the config of the algorithm does not have; a schedule that is left out has no length either."""
    for whole in (f"{MODEL}.lr_scheduler", f"{MODEL}.supervised"):
        for key in [key for key in made.settings if made.settings.get(whole, "") is None and key.startswith(f"{whole}.")]:
            del made.settings[key]
    kept = {"diffusionnft": ("surrogate.init_args.low", "surrogate.init_args.high", "sde.", "kl.kind"), "": ("surrogate.init_args.beta",)}
    left = kept.get(algorithm, kept[""])
    for key in [key for key in made.settings if key.removeprefix(f"{MODEL}.").startswith(left)]:
        del made.settings[key]
        made.notes.append(f"{key}: of no use to {algorithm}, and left out")
