"""Chooses what a run on a Ray cluster takes along: of the working folder, and of the variables."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from lit_rl.command_line.options import config_files, keys_of, options_of
from lit_rl.errors import ConfigError
from lit_rl.net.environment import HUB, SECRETS, VARIABLES

LEFT_OUT = ("outputs", "logs", "lightning_logs", "wandb", "node_modules", "*.ckpt", "*.egg-info")
"""Beside what `.gitignore` and `.rayignore` name, and what Ray itself leaves out: .git, .venv, venv, __pycache__."""

CARRIED = re.compile(
    r"PYTHONPATH|PYTHONWARNINGS|JOB_UUID|CUDA_DEVICE_ORDER|LOGLEVEL|https?_proxy|no_proxy"
    r"|(HF|TRANSFORMERS|HUGGING_FACE|TORCH|NCCL|GLOO|OMP|MKL|TRITON|WANDB|SWANLAB|REWARD|ROLLOUT|LIT_RL|TOKENIZERS|UCX|PLATFORM|DS|VLLM)_\w+",
    re.IGNORECASE,
)
JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""The variable in which Ray tells the command of `ray job submit` about its job."""

FOLDER = "LIT_RL_FOLDER"
"""The folder that a relative `run.dir` starts from, as the working folder of a node is a copy that Ray removes."""


def carried(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that the processes of a run read; those of a machine, such as PATH, are each node's own."""
    known = {*SECRETS, *HUB, *(variable.name for variable in VARIABLES)}
    return {name: value for name, value in environment.items() if name in known or CARRIED.fullmatch(name)}


def shipped_by_job(environment: Mapping[str, str]) -> bool:
    """True for the command of `ray job submit --working-dir ...`, whose working folder is on every node by that."""
    given = json.loads(environment.get(JOB) or "{}")
    return bool((given.get("runtime_env") or {}).get("working_dir"))


def excluded(folder: Path) -> list[str]:
    """Patterns of what is not sent to the nodes: LEFT_OUT and every virtual environment of the folder."""
    environments = [found.parent.name for found in folder.glob("*/pyvenv.cfg")]
    return [*LEFT_OUT, *(f"/{name}" for name in environments)]


def check_folder(run: Sequence[str], environment: Mapping[str, str]) -> None:
    """Raise ConfigError for a Ray job whose run would write into its copy of the working folder, which Ray removes."""
    keys = ("run.dir", "trainer.default_root_dir")
    given = [value for file in config_files(run) for path, value, _ in keys_of(file) if path in keys]
    given += [value for path, value in options_of(run) if path in keys] + [environment.get("OUTPUT_DIR", "")]
    if FOLDER not in environment and not any(Path(folder).expanduser().is_absolute() for folder in given):
        raise ConfigError(
            "run.dir is in a copy of the working folder, which Ray removes after the job: add --run.dir with the whole path of a folder "
            "that all nodes share"
        )
