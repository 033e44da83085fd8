"""The learning rate, once per optimizer step."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.callbacks import LearningRateMonitor

from callbacks.base import RLCallback


class LearningRate(RLCallback, LearningRateMonitor):
    """Lightning's monitor, with one point per optimizer step: that one logs another at an epoch's start and for each micro-batch.

    kwargs: See `lightning.pytorch.callbacks.LearningRateMonitor` (log_momentum, log_weight_decay).
    """

    def __init__(self, **kwargs: bool) -> None:
        super().__init__(logging_interval="step", **kwargs)

    def on_train_batch_start(self, trainer: L.Trainer, *args: object, **kwargs: object) -> None:
        """Log with the first micro-batch of an optimizer step."""
        ready = trainer.fit_loop.epoch_loop.batch_progress.current.ready  # this minibatch among them
        if (ready - 1) % trainer.accumulate_grad_batches == 0:
            super().on_train_batch_start(trainer, *args, **kwargs)
