"""The place in an epoch at which a checkpoint was written, and how Lightning's loops continue there: exactly, after any number of stops.

Lightning infers the place from counters that its own restart changes, so that a second restart can count a finished epoch or a finished
minibatch twice. Here the counters are set anew from two facts: how many epochs are over, and how many optimizer steps the present one has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loops.evaluation_loop import RestartStage
from torch import Tensor

if TYPE_CHECKING:
    import lightning as L


Counts = dict[str, int]
"""ready, started, processed and completed."""
Progress = dict[str, Counts]
"""total and current."""


class BatchProgress(TypedDict):
    """Progress with a mark of the last minibatch."""

    total: Counts
    current: Counts
    is_last_batch: bool


class OptimizerProgress(TypedDict):
    """Steps and clearings of gradients."""

    optimizer: dict[str, Progress]


FitLoop = TypedDict(
    "FitLoop",
    {
        "epoch_progress": Progress,
        "epoch_loop.batch_progress": BatchProgress,
        "epoch_loop.automatic_optimization.optim_progress": OptimizerProgress,
        "epoch_loop.scheduler_progress": Progress,
        "state_dict": dict[str, list[dict[str, int]]],
    },
)
"""Lightning's `checkpoint["loops"]["fit_loop"]`, as far as it is used here."""


@dataclass(frozen=True)
class Place:
    """epochs: that are over. minibatches: of the next one that are behind its last optimizer step.

    ended: these are all; validation and the end of the epoch are still to come. validated: validation after them is over.
    """

    epochs: int
    minibatches: int = 0
    ended: bool = False
    validated: bool = False


def place_of(loops: FitLoop, *, accumulate: int) -> Place:
    """From the counters of `checkpoint["loops"]["fit_loop"]`, whichever hook wrote them.

    accumulate: minibatches of an optimizer step. A gradient that is only partly there is in no checkpoint: its minibatches come again.
    """
    epoch, batch = loops["epoch_progress"]["current"], loops["epoch_loop.batch_progress"]
    steps = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["current"]["completed"]
    stepped, ended = steps * accumulate, batch["is_last_batch"]
    over, begun = epoch["ready"] == epoch["processed"], epoch["started"] == epoch["ready"]
    if over and not ended and steps:  # `trainer.should_stop` ended it early: max_time, early stopping
        return Place(epoch["processed"] - 1, stepped, validated=True)
    if over or not begun or not steps:
        return Place(epoch["processed"])
    ended = ended and batch["current"]["processed"] == batch["current"]["ready"]
    return Place(epoch["processed"], stepped, ended, validated=batch["current"]["completed"] >= stepped)


def minibatches_done(trainer: L.Trainer) -> int:
    """Minibatches of the present epoch whose training step is over."""
    return trainer.fit_loop.epoch_loop.batch_progress.current.processed  # type: ignore[attr-defined]


def set_counters(loops: FitLoop, place: Place) -> None:
    """Write `place` into the counters, before Lightning reads them."""
    inside = place.minibatches > 0
    for progress in loops["epoch_progress"].values():
        done = place.epochs
        progress |= {"ready": done + inside, "started": done + inside, "processed": done, "completed": done}
    batch = loops["epoch_loop.batch_progress"]
    before = batch["total"]["processed"] - batch["current"]["processed"] if inside else batch["total"]["processed"]
    for counts, done in ((batch["current"], place.minibatches), (batch["total"], before + place.minibatches)):
        counts |= dict.fromkeys(("ready", "started", "processed", "completed"), done)
    batch["is_last_batch"] = place.ended
    if not inside:
        optimizer = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
        for current in (optimizer["step"]["current"], optimizer["zero_grad"]["current"], loops["epoch_loop.scheduler_progress"]["current"]):
            current |= dict.fromkeys(current, 0)
    loops["state_dict"]["combined_loader"] = [{"start": place.minibatches}]


def continue_at(trainer: L.Trainer, place: Place) -> None:
    """Have the loops go on at `place`. In `on_train_start`, when they have read their counters and not begun."""
    fit, epoch = trainer.fit_loop, trainer.fit_loop.epoch_loop
    epoch._batches_that_stepped = trainer.global_step
    if not place.minibatches:
        fit.restarting = False  # a new epoch like any other
        return
    epoch.val_loop.restarting = False  # it begins at its first batch
    epoch.val_loop._restart_stage = RestartStage.NONE
    assert fit._data_fetcher is not None
    # Where validation is due Lightning goes through the end of the last minibatch again, with validation or without.
    if epoch._should_check_val_fx(fit._data_fetcher):
        epoch._batches_that_stepped -= 1
        if not place.validated:
            epoch.val_loop._restart_stage = RestartStage.RESTARTED_MID_EVALUATION


# ---------------------------------------------------------------------- what has been logged
class About(TypedDict):
    """Arguments of `log` that a metric was logged with."""

    fx: str
    name: str
    prog_bar: bool
    logger: bool
    on_step: bool
    on_epoch: bool
    add_dataloader_idx: bool
    reduce_fx: str
    sync_dist: bool
    rank_zero_only: bool


class Sum(TypedDict):
    """A metric of the present epoch."""

    about: About
    state: dict[str, Tensor]


class Logged(TypedDict):
    """See `logged`."""

    sums: list[Sum]
    callback_metrics: dict[str, Tensor]


def logged(trainer: L.Trainer) -> Logged:
    """This process's sums of the present epoch's metrics, and the last value of every metric that callbacks see."""
    sums: list[Sum] = []
    for metric in trainer.fit_loop.epoch_loop._results.values():
        if metric.is_tensor and not metric.has_reset:
            meta = metric.meta
            about: About = {
                "fx": meta.fx, "name": meta.name, "prog_bar": meta.prog_bar, "logger": meta.logger, "on_step": meta.on_step,
                "on_epoch": meta.on_epoch, "add_dataloader_idx": meta.add_dataloader_idx, "reduce_fx": meta.reduce_fx.__name__,
                "sync_dist": meta.sync.should, "rank_zero_only": meta.sync.rank_zero_only,
            }  # fmt: skip
            state = {name: getattr(metric, name, None) for name in ("value", "cumulated_batch_size", "_forward_cache")}
            sums.append({"about": about, "state": {k: v.detach().clone() for k, v in state.items() if isinstance(v, Tensor)}})
    values = trainer._logger_connector._callback_metrics
    return {"sums": sums, "callback_metrics": {k: torch.as_tensor(v) for k, v in values.items()}}


def log_again(trainer: L.Trainer, saved: Logged, *, inside: bool) -> None:
    """Metrics as they were when `logged` was called; the sums only inside of their epoch."""
    connector, device = trainer._logger_connector, trainer.strategy.root_device
    connector._callback_metrics |= {name: value.to(device) for name, value in saved["callback_metrics"].items()}
    if not inside or not saved["sums"]:
        return
    results = trainer.fit_loop.epoch_loop._results
    for metric in saved["sums"]:
        about, state = metric["about"], {name: value.to(device) for name, value in metric["state"].items()}
        results.log(value=state["value"], batch_size=1, sync_dist_fn=trainer.strategy.reduce, **about)
        for name, value in state.items():
            setattr(results[f"{about['fx']}.{about['name']}"], name, value)
    connector._first_loop_iter = False  # the first `log` of an epoch's first minibatch would reset them


# ---------------------------------------------------------------------- what callbacks do not tell of themselves
def saved_at(trainer: L.Trainer) -> dict[str, int]:
    """The optimizer step after which each ModelCheckpoint wrote last."""
    return {c.state_key: c._last_global_step_saved for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)}


def remember_saved(trainer: L.Trainer, steps: dict[str, int]) -> None:
    """Keep every ModelCheckpoint from writing the restored step again, in the middle of the next one."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            callback._last_global_step_saved = steps.get(callback.state_key, callback._last_global_step_saved)
