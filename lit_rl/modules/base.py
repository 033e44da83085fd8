"""The verbs every method shares: ask -> collect -> score -> credit -> split -> loss, one rollout per Lightning epoch."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Generic, TypeVar

import lightning as L
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR, ReduceLROnPlateau, SequentialLR

from lit_rl.checkpoints import version
from lit_rl.checkpoints.contents import check_kinds
from lit_rl.checkpoints.layout import check_adapters, check_layout
from lit_rl.checkpoints.optimizer import Groups, check_moment_shapes, check_same_optimizer, follow_options, settings_of
from lit_rl.checkpoints.options import REMEDY, check_options, options_of
from lit_rl.checkpoints.progress import Place, continue_at, log_again, logged, place_of, remember_saved, saved_at, set_counters
from lit_rl.errors import ConfigError
from lit_rl.losses.terms import Terms
from lit_rl.modules.meters import Meters
from lit_rl.ranks import gather_objects, gather_to_first
from lit_rl.replay.loader import ReplayLoader
from lit_rl.replay.sources import PromptSource
from lit_rl.rewards.base import Scorer
from lit_rl.seeding import generator
from lit_rl.strategies.checks import check_strategy
from lit_rl.types import Examples, Minibatch, Prompts, Rollout

R = TypeVar("R", bound=Rollout)


class LitRL(L.LightningModule, ABC, Generic[R]):
    """Base of all methods. One epoch is one iteration is one rollout; epoch 0 is the supervised warm-up if there is one.

    Optimization is Lightning's automatic one, so accumulation, clipping, precision, schedulers, checkpoints and strategies keep their
    documented meaning. `training_step` returns the sum of the terms of `loss`, scaled so that after Lightning's division by
    `accumulate_grad_batches` and the strategy's mean over ranks the gradient is that of the global weighted sum.

    Args:
        prompts_per_iteration: Different prompts in one rollout, over all processes.
        group_size: Samples of each prompt (G).
        inner_epochs: Passes over a rollout.
        warmup_steps: Optimizer steps of supervised learning on `data`'s examples before the first rollout (epoch 0).
        warmup_batch_size: Examples per warm-up step, over all processes. Micro-batches and processes share them as evenly as they go.
        warmup_lr: Peak learning rate of the warm-up, see `warmup_factor`; None = the optimizer's own.
        optimizer: E.g. `{class_path: torch.optim.AdamW, init_args: {lr: 3e-4}}`; its state restarts after the warm-up.
        lr_scheduler: Stepped once per optimizer step, counted from the end of the warm-up; `ReduceLROnPlateau` once per iteration.
        seed: Of rollouts, prompts order, minibatches and evaluation noise. The CLI sets it to `seed_everything`.
    """

    def __init__(
        self,
        *,
        prompts_per_iteration: int,
        group_size: int,
        inner_epochs: int = 1,
        warmup_steps: int = 0,
        warmup_batch_size: int = 32,
        warmup_lr: float | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.strict_loading = False  # see `checkpoint_keys`; what must be there is checked by name and shape
        _at_least(1, prompts_per_iteration=prompts_per_iteration, group_size=group_size, inner_epochs=inner_epochs)
        _at_least(1, warmup_batch_size=warmup_batch_size)
        _at_least(0, warmup_steps=warmup_steps)
        self.prompts_per_iteration = prompts_per_iteration
        self.group_size = group_size
        self.inner_epochs = inner_epochs
        self.warmup_steps = warmup_steps
        self.warmup_batch_size = warmup_batch_size
        self.warmup_lr = warmup_lr
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.seed = seed
        self.scorer: Scorer | None = None  # set by the callback that owns the rewards
        self.micro_batches_per_update = self.micro_batches_per_warmup_step = 1  # of an optimizer step on each process; set by `setup`
        self.rollout: R | None = None
        self.rollout_iteration = -1
        self.rollout_metrics: dict[str, float] = {}
        self.meters = Meters()  # what is said of an epoch
        self.step_meters = Meters()  # and of a single step
        self._plan: list[Tensor] = []
        self._place: Place | None = None  # where a restored run continues
        self._settings: Groups = []  # of the optimizer, as the options have them
        self._optimizer_class = ""  # before a strategy wraps it
        self._optimizer_before: dict[str, Any] = {}  # the same of a restored run
        self._before: dict[str, Any] = {}  # what had been logged, and when who had saved, until then
        self._logged: tuple[int, dict[str, Any]] = (-1, {})  # an optimizer step, and what had been logged when the next one began

    samples, actions = "images", "pairs"
    """What people call that of which a rollout has B, and B times S."""

    stored_with: Sequence[str] = ("prompts_per_iteration", "group_size", "inner_epochs", "seed")
    """Options, beside those of its bases, that a rollout depends on after it was made: inside an iteration a run keeps them."""

    asks: Sequence[str] = ("prompts",)
    """Methods and attributes of the datamodule that the method uses."""
    asks_once = True
    """Whether a rollout's prompts are `ask(iteration)`, all of them or some."""
    datamodules: str = "datamodules.prompts.PromptFiles"
    """A datamodule that has them, for messages."""

    # ------------------------------------------------------------------ what a method is
    @abstractmethod
    def collect(self, prompts: Prompts) -> R:
        """Let the policy act on `prompts` and submit each finished chunk to `self.scorer` while the next one is sampled."""

    @abstractmethod
    def credit(self, rollout: R) -> R:
        """`rollout.rewards` -> advantages "B S" and weights "B S"."""

    @property
    @abstractmethod
    def updates(self) -> int:
        """Optimizer steps of one pass over a rollout."""

    @abstractmethod
    def split(self, rollout: R, inner_epoch: int) -> Sequence[Tensor]:
        """Rows of each minibatch of one pass, `minibatches_per_pass()` of them."""

    @abstractmethod
    def minibatch(self, rollout: R, rows: Tensor) -> Minibatch:
        """The rows of a rollout that one forward needs, on `self.device`."""

    @abstractmethod
    def loss(self, minibatch: Minibatch) -> Terms:
        """The paper's loss as named terms, e.g. {"policy": Term(losses, weights), "kl": Term(kl, weights, coef=0.1)}."""

    def supervised_loss(self, batch: Examples) -> Tensor:
        """Warm-up loss, one number per example."""
        raise ConfigError(f"{type(self).__name__} has no supervised warm-up: set model.warmup_steps to 0")

    # ------------------------------------------------------------------ ask
    def ask(self, iteration: int) -> Prompts:
        """This process's prompts of an iteration, every prompt `group_size` times in a row."""
        return self.draw(iteration, self.prompts_per_iteration)

    def draw(self, number: int, count: int) -> Prompts:
        """This process's share of draw `number` of `count` prompts."""
        info, ids = self.data.prompts(number, count), range(count)[self.local(count)]
        group = torch.tensor(ids, dtype=torch.long).repeat_interleave(self.group_size)
        return Prompts(group=group, info=[info[g] for g in group.tolist()])

    # ------------------------------------------------------------------ score
    def score(self, rollout: R) -> R:
        """Await the rewards of everything that `collect` submitted."""
        with self.phase("score"):
            return replace(rollout, rewards=self.scores().gather())

    def scores(self) -> Scorer:
        if self.scorer is None:
            raise ConfigError("no rewards: add callbacks.reward_scoring.RewardScoring to trainer.callbacks")
        return self.scorer

    # ------------------------------------------------------------------ one iteration, served as an epoch
    @property
    def warmup_epochs(self) -> int:
        return 1 if self.warmup_steps else 0

    @property
    def iteration(self) -> int:
        """Rollouts finished before the current epoch."""
        return self.current_epoch - self.warmup_epochs

    @property
    def warming_up(self) -> bool:
        return self.current_epoch < self.warmup_epochs

    def train_loader(self) -> ReplayLoader:
        """What the datamodule's `train_dataloader` returns."""
        self.accumulate()
        return ReplayLoader(self)

    def accumulate(self) -> None:
        """Have Lightning accumulate the gradients of as many micro-batches as an optimizer step of the current epoch has."""
        self.trainer.accumulate_grad_batches = self.micro_batches_per_warmup_step if self.warming_up else self.micro_batches_per_update

    def minibatches_per_pass(self) -> int:
        """Minibatches that one pass over a rollout is cut into, on each process."""
        return self.updates * self.micro_batches_per_update

    def minibatches_per_epoch(self) -> int:
        if self.warming_up:
            return self.warmup_steps * self.micro_batches_per_warmup_step
        return self.inner_epochs * self.minibatches_per_pass()

    def minibatches_done(self) -> int:
        return self.trainer.fit_loop.epoch_loop.batch_progress.current.processed  # type: ignore[attr-defined]

    def replay(self, indices: range) -> Iterator[Minibatch]:
        self.accumulate()
        if self.warming_up:
            for index in indices:
                yield self.supervised_minibatch(index)
            return
        if self.rollout is None or self.rollout_iteration != self.iteration:
            self.rollout, self.rollout_iteration = self.iterate(), self.iteration
        self.rollout = self.rollout.to(self.device)  # a restored one was read before the model found its device
        self._plan = [rows for e in range(self.inner_epochs) for rows in self.split(self.rollout, e)]
        for index in indices:
            yield self.minibatch(self.rollout, self._plan[index])

    @torch.no_grad()
    def iterate(self) -> R:
        """ask -> collect -> score -> credit, in evaluation mode and under the trainer's precision."""
        self.rollout = None  # free the previous one before the new one is built
        self.zero_grad()  # Lightning lets go of gradients only before the next backward
        was_training = self.training
        self.eval()
        rollout = self.scored()
        self.train(was_training)
        rollout = self.credit(rollout)
        self.notify("on_rollout_end", rollout)
        return rollout

    def scored(self) -> R:
        """ask -> collect -> score."""
        with self.rolling_out():
            rollout = self.collect(self.ask(self.iteration))
        return self.score(rollout)

    @contextmanager
    def rolling_out(self) -> Iterator[None]:
        """The phase "rollout", under the trainer's precision."""
        with self.phase("rollout"), self.trainer.precision_plugin.forward_context():
            yield

    def supervised_minibatch(self, index: int) -> Examples:
        """This process's part of a warm-up step; where there are more parts than examples, an example of share 0."""
        step, part = divmod(index, self.micro_batches_per_warmup_step)
        parts = self.micro_batches_per_warmup_step * self.trainer.world_size
        rows = torch.arange(self.warmup_batch_size).tensor_split(parts)[part * self.trainer.world_size + self.global_rank]
        first, share = int(rows[0]) if len(rows) else 0, len(rows) * parts / self.warmup_batch_size
        info, images = self.data.examples(step, self.warmup_batch_size, slice(first, first + max(1, len(rows))))  # type: ignore[attr-defined]
        return Examples(info=info, images=images, step=step, first=first, share=share).to(self.device)

    # ------------------------------------------------------------------ loss
    def training_step(self, batch: Minibatch, batch_idx: int) -> Tensor:
        if isinstance(batch, Examples):
            loss = self.supervised_loss(batch).mean() * batch.share
            self.step_meters.mean({"warmup/loss": loss})
            return loss
        terms = self.loss(batch)
        sums = {name: self.of_step(term.sum()) for name, term in terms.items()}
        loss = torch.stack([term.coef * sums[name] for name, term in terms.items()]).sum()
        self.meters.mean({"loss": loss} | {f"{name}_loss": value for name, value in sums.items()})
        return loss

    def of_step(self, part: Tensor) -> Tensor:
        """A micro-batch's share of a step's sum, scaled so that the mean over micro-batches and processes is the sum."""
        return part * self.trainer.accumulate_grad_batches * self.trainer.world_size

    # ------------------------------------------------------------------ what is logged
    def report(self, values: Mapping[str, float], *, bar: Collection[str] = ()) -> None:
        """Log numbers of an epoch that are equal on all processes.

        They are not reduced again: Lightning would do that when a number is first read, which progress bars and other callbacks do on one
        process alone. `sync_dist` only keeps Lightning from asking for it, `rank_zero_only` takes its effect away.
        """
        for name, value in values.items():
            self.log(
                name, value, on_step=False, on_epoch=True, prog_bar=name in bar, batch_size=1, sync_dist=True, rank_zero_only=True
            )  # fmt: skip

    def report_step(self) -> None:
        """Log what there is to say of this optimizer step and, if it is the last one, of the epoch. Collective."""
        if self.step_meters:
            for name, value in self.step_meters.read(gather_objects).items():
                self.log(name, value, on_step=True, on_epoch=False, prog_bar=True)
        if self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:  # before any callback looks
            # For names of checkpoints, as exports have them: `filename: "iteration-{iteration:.0f}"` of ModelCheckpoint; 0 is the warm-up.
            self.log("iteration", self.iteration + 1.0, on_step=True, on_epoch=False, logger=False)
            self.report(self.meters.read(gather_objects) | self.rollout_metrics, bar=("reward_mean",))

    def on_train_epoch_end(self) -> None:
        self.trainer.fit_loop.restarting = False  # else Lightning leaves out what a plateau's schedule does after this
        if self.meters:  # the iteration was cut short
            self.report(self.meters.read(gather_objects) | self.rollout_metrics, bar=("reward_mean",))

    def count_actions(self, batch: Minibatch) -> int:
        """Actions that a minibatch trains."""
        return batch.weights.numel()

    # ------------------------------------------------------------------ optimization
    def parameter_groups(self) -> list[Any]:
        """What the optimizer gets: the trained parameters, or groups of them with settings of their own."""
        return [p for p in self.parameters() if p.requires_grad]

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.parameter_groups())
        schedule = self.build_schedule(optimizer)
        self._settings, self._optimizer_class = settings_of(optimizer), type(optimizer).__name__
        if schedule is None:
            return {"optimizer": optimizer}
        if isinstance(schedule, ReduceLROnPlateau):
            return {"optimizer": optimizer, "lr_scheduler": self.plateau(schedule)}
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def build_schedule(self, optimizer: Optimizer) -> LRScheduler | ReduceLROnPlateau | None:
        """`lr_scheduler`, after that of the warm-up."""
        after = self.lr_scheduler(optimizer) if self.lr_scheduler else None
        if not self.warmup_steps or isinstance(after, ReduceLROnPlateau):
            return after  # type: ignore[return-value]
        peak = 1.0 if self.warmup_lr is None else self.warmup_lr / optimizer.param_groups[0]["lr"]
        schedule = LambdaLR(
            optimizer, lambda step: peak * warmup_factor(step, steps=self.warmup_steps) if step < self.warmup_steps else 1.0
        )
        return schedule if after is None else SequentialLR(optimizer, [schedule, after], milestones=[self.warmup_steps])  # type: ignore[list-item]

    def plateau(self, scheduler: ReduceLROnPlateau) -> dict[str, Any]:
        """Asked once per iteration, where the metric is there."""
        metric = getattr(scheduler, "monitor", None)
        if metric is None or self.warmup_steps:
            raise ValueError(
                "ReduceLROnPlateau waits for a metric, which a supervised warm-up has not: use {class_path: lightning.pytorch.cli."
                "ReduceLROnPlateau, init_args: {monitor: reward_mean, mode: max}} with model.warmup_steps 0, or another"
            )
        return {"scheduler": scheduler, "monitor": metric, "interval": "epoch", "strict": False}

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """A gradient that is not finite would end in every weight: its step changes nothing, is counted and told of.

        Of DeepSpeed, which keeps gradients to itself, nothing is known here.
        """
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        if gradients:
            norm = nn.utils.get_total_norm(gradients)
            self.check_gradient(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        self.report_step()

    def check_gradient(self, norm: Tensor) -> None:
        """Leave out the optimizer step of a gradient with this norm if it is not finite."""
        if norm.isfinite():
            self.meters.mean({"grad_norm": norm})
            return
        self.zero_grad()
        self.meters.count("skipped_steps")
        rank_zero_warn(
            f"Optimizer step {self.trainer.global_step + 1} is left out: its gradient is not finite. If that goes on, lower the learning "
            "rate, and look at the last answers and rewards"
        )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self._logged = self.trainer.global_step, self._said()
        if self.warmup_steps and self.trainer.global_step == self.warmup_steps and not self.warming_up and batch_idx == 0:
            self.finish_warmup()

    def finish_warmup(self) -> None:
        """Forget the moments of the supervised gradients: they are orders of magnitude larger than a policy gradient's."""
        for state in self.trainer.optimizers[0].state.values():
            for name, value in state.items():
                state[name] = value.zero_() if isinstance(value, Tensor) else 0  # DeepSpeed's Adam counts its steps in an int

    # ------------------------------------------------------------------ Lightning's other hooks
    def setup(self, stage: str) -> None:
        check_strategy(self.trainer.strategy)
        self.check_parts(stage)
        self.micro_batches_per_update = self.micro_batches_per_warmup_step = self.trainer.accumulate_grad_batches
        if stage == "fit":
            self.trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]  # see ReplayLoader
            self.check_accumulation()
            self.check_geometry()
            self.accumulate()

    def check_accumulation(self) -> None:
        """Raise where something else than this class decides how many micro-batches an optimizer step has."""
        if any(isinstance(callback, GradientAccumulationScheduler) for callback in self.trainer.callbacks):  # type: ignore[attr-defined]
            raise ConfigError(
                "GradientAccumulationScheduler would change how many micro-batches make an optimizer step, which a rollout is cut by: take "
                "it out of trainer.callbacks"
            )

    def configure_callbacks(self) -> list[L.Callback]:
        """None. Raises, before any of them is set up, on those of Lightning that swap the weights that train, in checkpoints too."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
                raise ConfigError(
                    f"{type(callback).__name__} knows neither rollouts nor what a checkpoint of this project holds: use callbacks.ema.EMA "
                    "in its place in trainer.callbacks"
                )
        return []

    def check_parts(self, stage: str) -> None:
        """Raise where the run lacks a part that this method works with, before any model is loaded."""
        missing = [name for name in self.asks if not hasattr(self.data, name)]
        if missing:
            raise ConfigError(
                f"data: {type(self.data).__name__} has no `{missing[0]}`, which {type(self).__name__} asks for: use {self.datamodules}, or "
                "derive your datamodule from one in datamodules/ (docs/rewards.md shows a run with parts of your own)"
            )
        if stage == "fit":
            self.check_optimizer()
            if self.scorer is None and self.needs_rewards():
                raise ConfigError(
                    f"{type(self).__name__} learns from rewards, and the run has none: add {{class_path: "
                    "callbacks.reward_scoring.RewardScoring, init_args: {rewards: {...}}} to trainer.callbacks"
                )

    def needs_rewards(self) -> bool:
        """Rewards are part of the loss."""
        return True

    def check_optimizer(self) -> None:
        """Raise on settings that the optimizer or the schedule refuses, by building them once for a single weight."""
        try:
            optimizer = self.optimizer([nn.Parameter(torch.zeros(1, 1))])
            if self.lr_scheduler is not None:
                schedule = self.lr_scheduler(optimizer)
                if isinstance(schedule, ReduceLROnPlateau):
                    self.plateau(schedule)
                    return
                optimizer.step()
                schedule.step()  # some look at their settings only then
        except (ValueError, TypeError, ArithmeticError) as error:
            name = "lr_scheduler" if "optimizer" in locals() else "optimizer"
            raise ConfigError(f"model.{name}: {error}") from error

    def check_geometry(self) -> None:
        """Raise on sizes that do not divide, before any model is loaded."""
        world = self.trainer.world_size
        if self.prompts_per_iteration % world:
            raise ConfigError(
                f"model.prompts_per_iteration={self.prompts_per_iteration} does not divide among {world} processes; "
                f"use a multiple of {world}, e.g. {-(-self.prompts_per_iteration // world) * world}"
            )
        if (self.trainer.gradient_clip_val or 0) < 0:  # Lightning takes it for "do not clip"
            raise ConfigError(f"trainer.gradient_clip_val={self.trainer.gradient_clip_val} must be positive; leave it out to clip nothing")
        self.check_length()
        fast = self.trainer.fast_dev_run  # type: ignore[attr-defined]
        limit, overfit = self.trainer.limit_train_batches, self.trainer.overfit_batches  # type: ignore[attr-defined]
        if not fast and (overfit or limit != 1.0 or isinstance(limit, int)):  # 1 is one batch, 1.0 all
            name = "overfit_batches" if overfit else "limit_train_batches"
            raise ConfigError(
                f"trainer.{name} would train a part of every rollout only: take it out; model.prompts_per_iteration makes an iteration "
                "smaller, and trainer.max_epochs a run shorter"
            )
        if self.trainer.max_steps != -1 and not fast:  # which sets it for itself
            raise ConfigError(
                "trainer.max_steps breaks the one-epoch-one-rollout scheme on resume: set trainer.max_epochs "
                f"(iterations{' + 1 for the warm-up' if self.warmup_steps else ''}) and leave max_steps at -1"
            )

    def check_length(self) -> None:
        """Raise where a schedule of a fixed length is shorter than the run."""
        schedule = self.lr_scheduler(self.optimizer([nn.Parameter(torch.zeros(1, 1))])) if self.lr_scheduler else None
        if not isinstance(schedule, OneCycleLR) or (self.trainer.max_epochs or -1) < 0:
            return
        iterations = self.trainer.max_epochs - self.warmup_epochs  # type: ignore[operator]
        steps = iterations * self.inner_epochs * self.minibatches_per_pass() // self.micro_batches_per_update
        if schedule.total_steps < steps:
            raise ConfigError(
                f"model.lr_scheduler: OneCycleLR ends after total_steps={schedule.total_steps} optimizer steps, and this run has {steps} "
                f"(trainer.max_epochs={self.trainer.max_epochs}): set total_steps to {steps}"
            )

    def checkpoint_keys(self) -> set[str]:
        """Names in `state_dict()` of the weights that a checkpoint holds: all but what a policy reads again from its pretrained folder."""
        parts = [(name, part) for name, part in self.named_children() if hasattr(part, "checkpoint_keys")]
        left_out = {f"{name}.{key}" for name, part in parts for key in part.state_dict().keys() - part.checkpoint_keys()}  # type: ignore[operator]
        return self.state_dict().keys() - left_out

    def checkpoint_shapes(self) -> dict[str, list[int]]:
        """Shape by name of those weights, whole."""
        keys, tensors = self.checkpoint_keys(), [*self.named_parameters(), *self.named_buffers()]
        return {name: list(getattr(tensor, "ds_shape", tensor.shape)) for name, tensor in tensors if name in keys}

    def adapters(self) -> dict[str, dict[str, Any]]:
        """Layers and strengths of the trained adapters by model, see `lit_rl.checkpoints.layout.check_adapters`."""
        return {name: part.adapter for name, part in self.named_children() if getattr(part, "adapter", None)}  # type: ignore[misc]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[version.KEY] = version.CHECKPOINT_VERSION
        checkpoint["micro_batches"] = self.trainer.accumulate_grad_batches
        keys = self.checkpoint_keys()
        checkpoint["state_dict"] = {name: weight for name, weight in checkpoint["state_dict"].items() if name in keys}
        checkpoint["adapters"], checkpoint["warmup_steps"] = self.adapters(), self.warmup_steps
        place, configs = self._place_in(checkpoint), self.trainer.lr_scheduler_configs
        checkpoint["optimizer"] = {"class": self._optimizer_class, "groups": self._settings, "scheduled": bool(configs)}
        epoch = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]
        if configs and configs[0].reduce_on_plateau and epoch["completed"] < epoch["processed"]:  # asked right after these hooks
            value = self.trainer.callback_metrics.get(str(configs[0].monitor))
            checkpoint["optimizer"] |= {} if value is None else {"metric": float(value)}
        step, before = self._logged
        now = before if step == self.trainer.global_step else self._said()
        checkpoint["logged"] = {"ranks": gather_objects(_on_cpu(now)), "saved_at": saved_at(self.trainer)}
        if self.rollout is not None and not place.ended and self.rollout_iteration == place.epochs - self.warmup_epochs:
            about = {"iteration": self.rollout_iteration, "metrics": self.rollout_metrics, "world_size": self.trainer.world_size}
            about |= {"options": self.stored_options()}
            checkpoint["rollout"] = about | {"ranks": gather_to_first(_plain(self.rollout.to("cpu")))}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        version.check_version(checkpoint.get(version.KEY, 0))
        if "state_dict" in checkpoint:  # otherwise the strategy has looked at the weights and loaded them
            check_layout({name: weight.shape for name, weight in checkpoint["state_dict"].items()}, self.checkpoint_shapes())
            check_kinds(checkpoint["state_dict"], self.state_dict())
        check_adapters(checkpoint.get("adapters", {}), self.adapters())
        if self.trainer.state.fn != "fit":
            return
        if (began := checkpoint.get("warmup_steps", self.warmup_steps)) != self.warmup_steps:
            raise ConfigError(
                f"model.warmup_steps={self.warmup_steps}, and the run of this checkpoint began with {began}, from which its iterations and "
                f"its schedule are counted: continue with model.warmup_steps={began}"
            )
        self._place = self._place_in(checkpoint)
        set_counters(checkpoint["loops"]["fit_loop"], self._place)
        self._before = checkpoint.get("logged", {})
        self._look_at_optimizer(checkpoint)
        saved = checkpoint.get("rollout")
        if saved is None:
            return
        if saved["world_size"] != self.trainer.world_size:
            raise ConfigError(
                f"This checkpoint was written inside an iteration by {saved['world_size']} processes and cannot continue on "
                f"{self.trainer.world_size}: use as many devices, or a checkpoint from the end of an epoch"
            )
        check_options(saved.get("options", {}), self.stored_options())
        self.rollout = self.restore_rollout(saved["ranks"][self.global_rank])
        self.rollout_iteration, self.rollout_metrics = saved["iteration"], saved["metrics"]
        self.check_rollout(self.rollout)

    def stored_options(self) -> dict[str, Any]:
        """What a stored rollout was made with: the method, its options and the policy's."""
        return {"model.class_path": type(self).__name__, **options_of(self, "model")}

    def check_rollout(self, rollout: R) -> None:
        """Raise where a restored rollout is not what this run would train on."""
        here = {str(row["prompt"]) for row in self.ask(self.rollout_iteration).info} if self.asks_once else None
        if here is not None and (other := [text for text in map(str, rollout.text) if text not in here]):
            raise ConfigError(
                f"data: the prompts of iteration {self.rollout_iteration} are others than those of the rollout in the checkpoint, "
                f"which was written inside that iteration (there: {other[0][:60]!r}): continue with the data it was written with, {REMEDY}"
            )

    def _place_in(self, checkpoint: dict[str, Any]) -> Place:
        """Counted in the micro-batches of now: a run may go on in smaller or larger ones."""
        then = checkpoint.get("micro_batches", self.trainer.accumulate_grad_batches)
        place = place_of(checkpoint["loops"]["fit_loop"], accumulate=then)
        now = self.micro_batches_per_warmup_step if place.epochs < self.warmup_epochs else self.micro_batches_per_update
        return replace(place, minibatches=place.minibatches // then * now)

    def _said(self) -> dict[str, Any]:
        """What has been logged, and what is still summed up, on this process."""
        return logged(self.trainer) | {"meters": self.meters.state_dict()}

    def _look_at_optimizer(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the moments of another optimizer, and keep Lightning from restoring settings, which the options say."""
        if "lr_schedulers" not in checkpoint:
            raise ConfigError("this checkpoint holds weights only (save_weights_only), with which training cannot go on: use another")
        states, checkpoint["lr_schedulers"] = checkpoint["lr_schedulers"], []
        self._optimizer_before = checkpoint.get("optimizer", {"scheduled": bool(states)}) | {"schedules": states}
        self.check_moments(self._optimizer_before)
        if "optimizer_states" in checkpoint:  # otherwise the strategy has restored them
            check_moment_shapes(checkpoint["optimizer_states"], self.optimizer(self.parameter_groups()))
        if "callbacks" not in checkpoint:
            raise ConfigError("this checkpoint lacks the states of callbacks, so averages of weights would begin anew: use another")

    def check_moments(self, stored: Mapping[str, Any]) -> None:
        """Raise ConfigError where the moments in a checkpoint are those of another optimizer. stored: `checkpoint["optimizer"]`."""
        if stored.get("groups"):
            check_same_optimizer(stored, self.optimizer(self.parameter_groups()))

    def on_train_start(self) -> None:
        place, before, self._place, self._before = self._place, self._before, None, {}
        if place is None:
            return
        continue_at(self.trainer, place)
        schedule = next((config.scheduler for config in self.trainer.lr_scheduler_configs), None)
        optimizer = self.trainer.optimizers[0] if schedule is None else schedule.optimizer  # DeepSpeed wraps it
        follow_options(optimizer, self._settings, self._optimizer_before, schedule, step=self.trainer.global_step)  # type: ignore[arg-type]
        remember_saved(self.trainer, before.get("saved_at", {}))
        if len(before.get("ranks", ())) == self.trainer.world_size:
            log_again(self.trainer, before["ranks"][self.global_rank], inside=place.minibatches > 0)
            if place.minibatches:
                self.meters.load_state_dict(before["ranks"][self.global_rank].get("meters", {}), device=self.device)

    @abstractmethod
    def restore_rollout(self, fields: dict[str, Any]) -> R:
        """The method's own dataclass from its plain fields."""

    # ------------------------------------------------------------------ small helpers
    @property
    def data(self) -> PromptSource:
        datamodule = getattr(self.trainer, "datamodule", None)
        if datamodule is None:
            raise ConfigError(f"the run has no data: give a datamodule, e.g. {self.datamodules}")
        return datamodule

    def local(self, count: int) -> slice:
        """This process's contiguous share of `count` things."""
        size = count // self.trainer.world_size
        return slice(self.global_rank * size, (self.global_rank + 1) * size)

    def all_ranks(self, x: Tensor) -> Tensor:
        """Rows of every process, in order of rank: "B ..." -> "W*B ..."."""
        if self.trainer.world_size == 1:
            return x
        rows = self.all_gather(x)
        assert isinstance(rows, Tensor)
        return rows.flatten(0, 1)

    def permutation(self, n: int, *purpose: int | str) -> Tensor:
        """A permutation of n that depends on the seed and `purpose` alone."""
        return torch.randperm(n, generator=generator(self.seed, *purpose))

    def notify(self, hook: str, *args: Any) -> None:
        """Call `hook(trainer, module, *args)` of every callback that has it: on_phase_start/end, on_rollout_chunk, on_rollout_end, ..."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            method = getattr(callback, hook, None)
            if method is not None:
                method(self.trainer, self, *args)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Tell the callbacks when a phase ("rollout", "score", ...) starts and ends."""
        self.notify("on_phase_start", name)
        try:
            yield
        finally:
            self.notify("on_phase_end", name)


def logged_step(trainer: L.Trainer, module: LitRL[Any]) -> int:
    """The step under which loggers get the numbers of this epoch: those of a rollout come at its end, with its last optimizer step."""
    now = trainer.fit_loop.epoch_loop._batches_that_stepped
    return now + module.inner_epochs * module.updates - 1 if trainer.training and not module.warming_up else now


def warmup_factor(step: int, *, steps: int) -> float:
    """Share of the peak learning rate at a step of a supervised warm-up: a straight rise over its first 5 %, times half a cosine to 0."""
    return min(1.0, (step + 1) / max(1, steps // 20)) * (1 + math.cos(math.pi * step / steps)) / 2


def _on_cpu(value: Any) -> Any:
    return apply_to_collection(value, Tensor, lambda tensor: tensor.cpu())


def _plain(rollout: Rollout) -> dict[str, Any]:
    fields = dict(vars(rollout))
    fields["info"] = [{"prompt": row["prompt"]} for row in rollout.info]  # the rest, images perhaps, was for rollout and rewards
    return fields


def _at_least(minimum: int, **values: int) -> None:
    for name, value in values.items():
        if value < minimum:
            raise ConfigError(f"model.{name}={value} must be at least {minimum}")
