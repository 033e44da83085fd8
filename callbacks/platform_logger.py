"""The platform as a logger of Lightning's."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Mapping, Sequence

from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn

from lit_rl.modules.base import LitRL
from lit_rl.modules.reporting import last_step
from lit_rl.trackers.dual import DualLogger, init_logging
from lit_rl.trackers.samples import Sample

STEP_METRICS = ("epoch",)
EVALUATIONS = ("val/", "eval/")


class PlatformLogger(Logger):
    """Metrics, samples, checkpoints and length of the run for the platform at $PLATFORM_URL, under the job $JOB_UUID.

    The command line adds it where both variables are set. Reports wait in a queue: a platform that is away stops no run.

    Args:
        wandb: Report to Weights & Biases beside it, as project $WANDB_PROJECT.
    """

    def __init__(self, *, wandb: bool = False) -> None:
        super().__init__()
        self._wandb, self._step = wandb, 0
        self._logger: DualLogger | None = None
        self._evaluated: dict[str, float] = {}

    @property
    def name(self) -> str:
        """The name of the service."""
        return "platform"

    @property
    def version(self) -> str:
        """The job's id."""
        return os.environ.get("JOB_UUID", "")

    @property
    def experiment(self) -> DualLogger:
        """The guide's logger; it begins here."""
        self._logger = self._logger or init_logging(wandb_enabled=self._wandb)
        return self._logger

    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, object] | Namespace) -> None:
        """Options of the run, for Weights & Biases."""
        self.experiment.log_config(vars(params) if isinstance(params, Namespace) else params)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Numbers of a step."""
        if step is not None and step != self._step:
            self._step, self._evaluated = step, {}
        self._evaluated |= {key: float(value) for key, value in metrics.items() if key.startswith(EVALUATIONS)}
        epoch = metrics.get("epoch")
        numbers = {key: value for key, value in metrics.items() if key not in STEP_METRICS}
        self.experiment.log_metrics(self._step, numbers, epoch=None if epoch is None else int(epoch))

    @rank_zero_only
    def log_samples(self, samples: Sequence[Sample]) -> None:
        """Samples of a step."""
        self.experiment.log_samples(samples)

    @rank_zero_only
    def log_graph(self, model: nn.Module, input_array: Tensor | None = None) -> None:
        """Tell how many steps the run has. Lightning calls it with the method when a run begins."""
        if isinstance(model, LitRL) and model.trainer.training and (last := last_step(model.trainer, model)) is not None:
            self.experiment.log_last_step(last)

    @rank_zero_only
    def after_save_checkpoint(self, checkpoint_callback: Checkpoint) -> None:
        """A checkpoint that was written, with what an evaluation found at its step; first of all the number that it is kept for."""
        path = str(getattr(checkpoint_callback, "_last_checkpoint_saved", ""))  # Lightning has no public name for it
        if isinstance(checkpoint_callback, ModelCheckpoint) and path:
            monitor, value = checkpoint_callback.monitor, checkpoint_callback.best_k_models.get(path)
            watched = {} if monitor is None or value is None else {monitor: float(value)}
            self.experiment.log_checkpoint(self._step, path, watched | self._evaluated or None)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Send what waits. The platform itself decides how its own jobs ended."""
        if self._logger is not None:
            self._logger.finish(0 if status == "success" else 1)
            self._logger = None
