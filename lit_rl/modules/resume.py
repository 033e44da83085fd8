"""A run that goes on where a checkpoint was written: its place, its rollout, its optimizer, and what it had logged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import lightning as L
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lit_rl.checkpoints import version
from lit_rl.checkpoints.contents import check_kinds
from lit_rl.checkpoints.layout import Weights, adapters_of, check_adapters, check_layout, checkpoint_keys, checkpoint_shapes
from lit_rl.checkpoints.optimizer import Groups, check_moment_shapes, check_moments, follow_options, settings_of
from lit_rl.checkpoints.options import REMEDY, check_options
from lit_rl.checkpoints.progress import Place, continue_at, log_again, logged, place_of, remember_saved, saved_at, set_counters
from lit_rl.errors import ConfigError
from lit_rl.modules.meters import Meters
from lit_rl.modules.reporting import Report
from lit_rl.ranks import gather_objects, gather_to_first
from lit_rl.strategies.summing import sum_in_order
from lit_rl.types import Rollout


class Resumable(Weights, Protocol):
    """A method whose runs can be continued."""

    trainer: L.Trainer
    meters: Meters
    reported: Report
    rollout: Any
    rollout_iteration: int
    rollout_metrics: dict[str, float]

    @property
    def device(self) -> torch.device: ...
    @property
    def global_rank(self) -> int: ...
    @property
    def warmup_steps(self) -> int: ...
    @property
    def warmup_epochs(self) -> int: ...
    def micro_batches_of_step(self, *, warmup: bool) -> int: ...
    def check_rollout(self, rollout: Any) -> None: ...
    def configured_optimizer(self) -> torch.optim.Optimizer: ...
    def restore_rollout(self, fields: dict[str, Any]) -> Rollout: ...
    def stored_options(self) -> dict[str, Any]: ...


class Resume:
    """The state that a checkpoint holds beside the weights and that a restored run continues from."""

    def __init__(self) -> None:
        self.place: Place | None = None  # where a restored run continues
        self.optimizer_class = ""  # before a strategy wraps it
        self.settings: Groups = []  # of the optimizer, as the options have them
        self.optimizer_before: dict[str, Any] = {}  # the same of a restored run
        self.logged_before: dict[str, Any] = {}  # what had been logged, and when which callback had saved, until then
        self.logged: tuple[int, dict[str, Any]] = (-1, {})  # an optimizer step, and what had been logged when the next one began

    def note_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Remember class and settings of a new optimizer."""
        self.optimizer_class, self.settings = type(optimizer).__name__, settings_of(optimizer)

    def note_step(self, method: Resumable) -> None:
        """Remember what has been logged before an optimizer step begins."""
        self.logged = method.trainer.global_step, _everything_logged(method)

    # ------------------------------------------------------------------ saving
    def save(self, method: Resumable, checkpoint: dict[str, Any]) -> None:
        """Complete a checkpoint that Lightning is about to write. Collective."""
        trainer, keys = method.trainer, checkpoint_keys(method)
        checkpoint[version.KEY] = version.CHECKPOINT_VERSION
        checkpoint["micro_batches"] = trainer.accumulate_grad_batches
        checkpoint["state_dict"] = {name: weight for name, weight in checkpoint["state_dict"].items() if name in keys}
        checkpoint["adapters"], checkpoint["warmup_steps"] = adapters_of(method), method.warmup_steps
        place = _place_in(method, checkpoint)
        checkpoint["optimizer"] = self._optimizer(trainer, checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"])
        step, before = self.logged
        now = before if step == trainer.global_step else _everything_logged(method)
        now |= {"meters": now["meters"].state_dict()}
        checkpoint["logged"] = {"ranks": gather_objects(_on_cpu(now)), "saved_at": saved_at(trainer)}
        if method.rollout is not None and not place.ended and method.rollout_iteration == place.epochs - method.warmup_epochs:
            checkpoint["rollout"] = {
                "iteration": method.rollout_iteration,
                "metrics": method.rollout_metrics,
                "world_size": trainer.world_size,
                "options": method.stored_options(),
                "ranks": gather_to_first(_plain(method.rollout.to("cpu"))),
            }

    def _optimizer(self, trainer: L.Trainer, epoch: Mapping[str, int]) -> dict[str, Any]:
        configs = trainer.lr_scheduler_configs
        about: dict[str, Any] = {"class": self.optimizer_class, "groups": self.settings, "scheduled": bool(configs)}
        if configs and configs[0].reduce_on_plateau and epoch["completed"] < epoch["processed"]:  # asked right after these hooks
            value = trainer.callback_metrics.get(str(configs[0].monitor))
            about |= {} if value is None else {"metric": float(value)}
        return about

    # ------------------------------------------------------------------ loading
    def load(self, method: Resumable, checkpoint: dict[str, Any]) -> None:
        """Compare a checkpoint with the run and, in a fit, prepare to go on from it. Raises ConfigError where they do not fit."""
        version.check_version(checkpoint.get(version.KEY, 0))
        if "state_dict" in checkpoint:  # otherwise the strategy has looked at the weights and loaded them
            check_layout({name: weight.shape for name, weight in checkpoint["state_dict"].items()}, checkpoint_shapes(method))
            check_kinds(checkpoint["state_dict"], method.state_dict())
        check_adapters(checkpoint.get("adapters", {}), adapters_of(method))
        if method.trainer.state.fn != "fit":
            return
        if (began := checkpoint.get("warmup_steps", method.warmup_steps)) != method.warmup_steps:
            raise ConfigError(
                f"model.supervised.warmup_steps={method.warmup_steps}, and the run of this checkpoint began with {began}, from which its "
                f"iterations and its schedule are counted: continue with model.supervised.warmup_steps={began}"
            )
        self.place = _place_in(method, checkpoint)
        set_counters(checkpoint["loops"]["fit_loop"], self.place)
        self.logged_before = checkpoint.get("logged", {})
        self._load_optimizer(method, checkpoint)
        if checkpoint.get("rollout") is not None:
            _load_rollout(method, checkpoint["rollout"])

    def _load_optimizer(self, method: Resumable, checkpoint: dict[str, Any]) -> None:
        """Refuse the moments of another optimizer, and keep Lightning from restoring settings, which the options say."""
        if "lr_schedulers" not in checkpoint:
            raise ConfigError("this checkpoint holds weights only (save_weights_only), with which training cannot go on: use another")
        states, checkpoint["lr_schedulers"] = checkpoint["lr_schedulers"], []
        self.optimizer_before = checkpoint.get("optimizer", {"scheduled": bool(states)}) | {"schedules": states}
        check_moments(self.optimizer_before, method.configured_optimizer)
        if "optimizer_states" in checkpoint:  # otherwise the strategy has restored them
            check_moment_shapes(checkpoint["optimizer_states"], method.configured_optimizer())
        if "callbacks" not in checkpoint:
            raise ConfigError("this checkpoint lacks the states of callbacks, so averages of weights would begin anew: use another")

    def go_on(self, method: Resumable) -> None:
        """Take up the place, the schedule and the log of a restored run, when training starts. A run that is not restored sums as one."""
        sum_in_order(method.trainer.strategy)
        place, before, self.place, self.logged_before = self.place, self.logged_before, None, {}
        if place is None:
            return
        trainer = method.trainer
        continue_at(trainer, place)
        schedule = next((config.scheduler for config in trainer.lr_scheduler_configs), None)
        optimizer = trainer.optimizers[0] if schedule is None else schedule.optimizer  # DeepSpeed wraps it
        follow_options(optimizer, self.settings, self.optimizer_before, schedule, step=trainer.global_step)  # type: ignore[arg-type]
        remember_saved(trainer, before.get("saved_at", {}))
        if len(before.get("ranks", ())) == trainer.world_size:
            mine = before["ranks"][method.global_rank]
            log_again(trainer, mine, inside=place.minibatches > 0)
            if place.minibatches:
                method.meters.load_state_dict(mine.get("meters", {}))
                method.reported.unlogged = dict(mine.get("reported", {}))


def _load_rollout(method: Resumable, saved: Mapping[str, Any]) -> None:
    if saved["world_size"] != method.trainer.world_size:
        raise ConfigError(
            f"This checkpoint was written inside an iteration by {saved['world_size']} processes and cannot continue on "
            f"{method.trainer.world_size}: use as many devices, or a checkpoint from the end of an epoch"
        )
    check_options(saved.get("options", {}), method.stored_options())
    method.rollout = method.restore_rollout(saved["ranks"][method.global_rank])
    method.rollout_iteration, method.rollout_metrics = saved["iteration"], saved["metrics"]
    method.check_rollout(method.rollout)


def check_prompts(stored: Sequence[str], here: Sequence[str], *, iteration: int) -> None:
    """Raise ConfigError where a restored rollout has a prompt that is none of those that the data has for its iteration."""
    known = set(here)
    if other := [text for text in stored if text not in known]:
        raise ConfigError(
            f"data: the prompts of iteration {iteration} are others than those of the rollout in the checkpoint, "
            f"which was written inside that iteration (there: {other[0][:60]!r}): continue with the data it was written with, {REMEDY}"
        )


def _place_in(method: Resumable, checkpoint: Mapping[str, Any]) -> Place:
    """Counted in the micro-batches of now: a run may go on in smaller or larger ones."""
    then = checkpoint.get("micro_batches", method.trainer.accumulate_grad_batches)
    place = place_of(checkpoint["loops"]["fit_loop"], accumulate=then)
    now = method.micro_batches_of_step(warmup=place.epochs < method.warmup_epochs)
    return replace(place, minibatches=place.minibatches // then * now)


def _everything_logged(method: Resumable) -> dict[str, Any]:
    """All metrics that were logged, and those that are still summed up, on this process."""
    return logged(method.trainer) | {"meters": method.meters.copy(), "reported": dict(method.reported.unlogged)}


def _on_cpu(value: Any) -> Any:
    return apply_to_collection(value, Tensor, lambda tensor: tensor.cpu())


def _plain(rollout: Rollout) -> dict[str, Any]:
    fields = dict(vars(rollout))
    fields["info"] = [{"prompt": row["prompt"]} for row in rollout.info]  # the rest, images perhaps, was for rollout and rewards
    return fields
