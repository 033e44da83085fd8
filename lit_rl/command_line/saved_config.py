"""The run's options as a file beside its logs, and as the hyper-parameters of every logger."""

from __future__ import annotations

from collections.abc import Mapping

import lightning as L
import yaml
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.trainer.states import TrainerFn

from callbacks.base import is_trial

SECRET = ("api_key", "token", "password", "secret")


class SavedConfig(SaveConfigCallback):
    """`config.yaml` of a training run; validate, test and predict write `config-validate.yaml`, ... and leave it as it is.

    Beside what the first logger writes, or in `trainer.default_root_dir` where that has no folder. Loggers get the options of a training
    run as hyper-parameters, without keys and passwords; no checkpoint does, because LightningCLI would take them for this run's.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.already_saved:
            return
        self.already_saved = True
        folder = trainer.log_dir or trainer.default_root_dir  # broadcast by the first process
        if not trainer.is_global_zero:
            return
        text = self.parser.dump(self.config, skip_none=False)
        name = "config.yaml" if stage == "fit" else f"config-{TrainerFn(stage).value}.yaml"
        files = get_filesystem(folder)
        files.makedirs(folder, exist_ok=True)
        with files.open(f"{folder}/{name}", "w") as stream:
            stream.write(text)
        if stage == "fit" and not is_trial(trainer):
            options = without_secrets(yaml.safe_load(text))
            for logger in trainer.loggers:
                logger.log_hyperparams(options)


def without_secrets(options: Mapping[str, object]) -> dict[str, object]:
    """A copy with stars for what nobody should read on a tracker's page."""
    return {key: "***" if key in SECRET and value is not None else _starred(value) for key, value in options.items()}


def _starred(value: object) -> object:
    if isinstance(value, dict):
        return without_secrets(value)
    return [_starred(inner) for inner in value] if isinstance(value, list) else value
