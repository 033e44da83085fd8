"""Logging of numbers that are equal on all processes: those of an epoch, and those of an optimizer step."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

import lightning as L

from lit_rl.modules.meters import Meters
from lit_rl.ranks import gather_objects


def report(module: L.LightningModule, values: Mapping[str, float], *, bar: Collection[str] = ()) -> None:
    """Log numbers of an epoch that are equal on all processes.

    They are not reduced again: Lightning would do that when a number is first read, which progress bars and other callbacks do on one
    process alone. `sync_dist` only keeps Lightning from asking for it, `rank_zero_only` takes its effect away.
    """
    for name, value in values.items():
        module.log(
            name, value, on_step=False, on_epoch=True, prog_bar=name in bar, batch_size=1, sync_dist=True, rank_zero_only=True
        )  # fmt: skip


def report_step(module: L.LightningModule, meters: Meters, *, iteration: int | None) -> None:
    """Log the numbers of an optimizer step. Collective.

    iteration: After the last step of an epoch, the number of iterations that are over; it is for the names of checkpoints, as exports have
    them: `filename: "iteration-{iteration:.0f}"` of ModelCheckpoint; 0 is the warm-up.
    """
    if meters:
        for name, value in meters.read(gather_objects).items():
            module.log(name, value, on_step=True, on_epoch=False, prog_bar=True)
    if iteration is not None:
        module.log("iteration", float(iteration), on_step=True, on_epoch=False, logger=False)


class Iterating(Protocol):
    """A method that is somewhere in its iterations."""

    inner_epochs: int

    @property
    def updates(self) -> int: ...
    @property
    def warming_up(self) -> bool: ...


def logged_step(trainer: L.Trainer, method: Iterating) -> int:
    """The step under which loggers get the numbers of this epoch: those of a rollout come at its end, with its last optimizer step."""
    now = trainer.fit_loop.epoch_loop._batches_that_stepped
    return now + method.inner_epochs * method.updates - 1 if trainer.training and not method.warming_up else now
