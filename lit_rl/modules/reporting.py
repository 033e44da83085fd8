"""Logging of numbers that are equal on all processes: those of an epoch, and those of an optimizer step."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

import lightning as L
import torch

from lit_rl.modules.meters import Meters
from lit_rl.ranks import gather_objects


class Report:
    """Numbers of the epoch under way, equal on all processes.

    In training they go to the trainer's dictionaries, where progress bars and monitoring callbacks look, and once per epoch to the loggers,
    as Lightning's own monitors do it: `LightningModule.log` copies, checks and reduces each number, half a millisecond for each. An
    evaluation's numbers go through `log`, since `Trainer.validate` prints and returns what was logged.
    """

    def __init__(self) -> None:
        self.unlogged: dict[str, float] = {}

    def add(self, module: L.LightningModule, values: Mapping[str, float], *, bar: Collection[str] = ()) -> None:
        """Take in numbers by name. bar: names of those that the progress bar shows."""
        trainer = module.trainer
        if not trainer.training:
            for name, value in values.items():  # rank_zero_only: not reduced again; sync_dist: Lightning does not ask for it
                module.log(name, value, on_epoch=True, prog_bar=name in bar, batch_size=1, sync_dist=True, rank_zero_only=True)
            return
        numbers = dict(zip(values, torch.tensor(list(values.values()), device=trainer.strategy.root_device).unbind(), strict=True))
        trainer.callback_metrics.update(numbers)
        trainer.logged_metrics.update(numbers)
        trainer.progress_bar_metrics.update({name: value for name, value in values.items() if name in bar})
        self.unlogged.update(values)

    def log(self, trainer: L.Trainer) -> None:
        """At the end of an epoch: have the loggers write its numbers, under the step of its last optimizer step."""
        row, self.unlogged = self.unlogged, {}
        for logger in trainer.loggers if row else ():
            logger.log_metrics({**row, "epoch": trainer.current_epoch}, step=trainer.fit_loop.epoch_loop._batches_that_stepped - 1)
            logger.save()


def name_iteration(trainer: L.Trainer, over: int) -> None:
    """Have checkpoints named by the iterations that are over, as exports are; 0 is the warm-up.

    E.g. `filename: "iteration-{iteration:.0f}"` of ModelCheckpoint.
    """
    trainer.callback_metrics["iteration"] = torch.tensor(float(over), device=trainer.strategy.root_device)


def report_step(module: L.LightningModule, meters: Meters) -> None:
    """Log the numbers of an optimizer step. Collective."""
    if meters:
        for name, value in meters.read(gather_objects).items():
            module.log(name, value, on_step=True, on_epoch=False, prog_bar=True)


class Iterating(Protocol):
    """A method that is somewhere in its iterations."""

    inner_epochs: int

    @property
    def warmup_steps(self) -> int: ...
    @property
    def warmup_epochs(self) -> int: ...
    @property
    def updates(self) -> int: ...
    @property
    def warming_up(self) -> bool: ...


def logged_step(trainer: L.Trainer, method: Iterating) -> int:
    """The step under which loggers get the numbers of this epoch: those of a rollout come at its end, with its last optimizer step."""
    now = trainer.fit_loop.epoch_loop._batches_that_stepped
    return now + method.inner_epochs * method.updates - 1 if trainer.training and not method.warming_up else now


def last_step(trainer: L.Trainer, method: Iterating) -> int | None:
    """The step under which loggers get the numbers of the last epoch of a run; None for a run without end."""
    iterations = (trainer.max_epochs or 0) - method.warmup_epochs
    return method.warmup_steps + iterations * method.inner_epochs * method.updates - 1 if iterations > 0 else None
