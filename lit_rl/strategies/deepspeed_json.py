"""A user's own DeepSpeed JSON, without what the run itself decides: batch sizes, precision, clipping and optimizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lit_rl.errors import ConfigError

Json = dict[str, object]

DECIDED = {
    "train_batch_size": "the method's options",
    "train_micro_batch_size_per_gpu": "the method's options",
    "gradient_accumulation_steps": "the method's options",
    "gradient_clipping": "trainer.gradient_clip_val",
    "fp16": "trainer.precision",
    "bf16": "trainer.precision",
    "amp": "trainer.precision",
    "optimizer": "model.init_args.optimizer",
    "scheduler": "model.init_args.lr_scheduler",
}
"""Keys of DeepSpeed's configuration, and what decides them in a run."""


def read_json(config: str | Mapping[str, object]) -> Json:
    """The settings of a file or mapping, for any number of processes: without `DECIDED` and without values "auto", which are DeepSpeed's
    defaults then. Says once what was left out. Raises ConfigError for what is no JSON."""
    if isinstance(config, str):
        file = Path(config).expanduser()
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"trainer.strategy.init_args.config: {config} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise ConfigError(f"trainer.strategy.init_args.config: {config} is not JSON: {error}") from error
        if not isinstance(found, dict):
            raise ConfigError(f"trainer.strategy.init_args.config: {config} holds no mapping, such as {{zero_optimization: {{stage: 2}}}}")
    else:
        found = dict(config)
    set_there = [key for key in DECIDED if key in found and not _all_auto(found[key])]
    if set_there:
        rank_zero_info("of DeepSpeed's configuration the run decides " + ", ".join(f"{key} ({DECIDED[key]})" for key in set_there))
    return {key: value for key, value in _without_auto(found).items() if key not in DECIDED}


def _without_auto(values: Mapping[str, object]) -> Json:
    return {key: _without_auto(value) if isinstance(value, Mapping) else value for key, value in values.items() if value != "auto"}


def _all_auto(value: object) -> bool:
    """Nothing but "auto" in it, names of classes aside."""
    if isinstance(value, Mapping):
        return all(_all_auto(inner) for key, inner in value.items() if key != "type")
    return value == "auto" or value is False
