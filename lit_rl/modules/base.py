"""The stations every method shares: ask -> collect -> score -> credit -> split -> loss, one rollout per Lightning epoch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.optim import Optimizer

from lit_rl.checkpoints.layout import Shardable
from lit_rl.checkpoints.options import options_of
from lit_rl.errors import ConfigError
from lit_rl.modules.checks import check_at_least, check_callbacks, check_divides, check_precision, check_trainer, refuse_no_rewards
from lit_rl.modules.evaluation import all_prompts, summaries
from lit_rl.modules.hooks import notify, phase
from lit_rl.modules.meters import Meters
from lit_rl.modules.method import Method, R
from lit_rl.modules.models import load_policy, place_of, shard_models
from lit_rl.modules.optimization import check_length, check_optimizer, configured, forget_moments, leave_out_not_finite, parameter_groups
from lit_rl.modules.reporting import Report, name_iteration, report_step
from lit_rl.modules.resume import Resume, check_prompts
from lit_rl.modules.supervised import Supervised
from lit_rl.policies.base import Policy
from lit_rl.ranks import gather_objects, gather_rows
from lit_rl.replay.loader import ReplayLoader
from lit_rl.replay.sources import PromptSource, S, datamodule_of, source_of
from lit_rl.rewards.base import RewardQueue
from lit_rl.strategies.checks import check_strategy
from lit_rl.types import Examples, Minibatch, Prompts


class LitRL(L.LightningModule, Method[R]):
    """Base of all methods, see `Method`. One epoch is one iteration is one rollout; epoch 0 is the supervised warm-up if there is one.

    Optimization is Lightning's automatic one, whose options keep their meaning. `training_step` returns the sum of the terms of `loss`,
    scaled so that Lightning's division by `accumulate_grad_batches` and the strategy's mean over ranks give the gradient of the global
    weighted sum.

    Args:
        policy: The model that is trained.
        prompts_per_iteration: Different prompts in one rollout, over all processes.
        group_size: Samples of each prompt (G).
        inner_epochs: Passes over a rollout.
        optimizer: E.g. `{class_path: torch.optim.AdamW, init_args: {lr: 3e-4}}`; its state restarts after a warm-up.
        lr_scheduler: Stepped once per optimizer step, counted from the end of a warm-up; `ReduceLROnPlateau` once per iteration.
        seed: Of rollouts, prompts order, minibatches and evaluation noise. The CLI sets it to `seed_everything`.
    """

    policy: Policy
    stored_with: Sequence[str] = ("prompts_per_iteration", "group_size", "inner_epochs", "seed")

    def __init__(
        self,
        policy: Policy,
        *,
        prompts_per_iteration: int,
        group_size: int,
        inner_epochs: int = 1,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.strict_loading = False  # see `checkpoint_keys`; what must be there is checked by name and shape
        check_at_least(1, prompts_per_iteration=prompts_per_iteration, group_size=group_size, inner_epochs=inner_epochs)
        self.prompts_per_iteration, self.group_size, self.inner_epochs = prompts_per_iteration, group_size, inner_epochs
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.policy, self.seed = policy, seed
        self.supervised: Supervised | None = None
        self.reward_queue: RewardQueue | None = None  # set by the callback that owns the rewards
        self.micro_batches_per_update = 1  # of an optimizer step, on each process; `setup` counts them
        self.example_micro_batches, self.warmup_micro_batches = 0, 1  # beside those, and of a warm-up step
        self.rollout: R | None = None
        self.rollout_iteration, self.non_finite = -1, 0  # non_finite: samples of the last rollout, over all processes
        self.rollout_metrics: dict[str, float] = {}
        self.meters, self.step_meters, self.reported = Meters(), Meters(), Report()  # of an epoch; of an optimizer step; what is logged
        self.evaluated: list[Prompts] = []
        self.resume = Resume()

    # ------------------------------------------------------------------ ask and score
    def ask(self, iteration: int) -> Prompts:
        """This process's prompts of an iteration, every prompt `group_size` times in a row."""
        return self.draw(iteration, self.prompts_per_iteration)

    def draw(self, number: int, count: int) -> Prompts:
        """This process's share of draw `number` of `count` prompts."""
        info, size = self.data.prompts(number, count), count // self.trainer.world_size
        group = (torch.arange(size) + self.global_rank * size).repeat_interleave(self.group_size)
        return Prompts(group=group, info=[info[g] for g in group.tolist()])

    def score(self, rollout: R) -> R:
        """Await the rewards of everything that `collect` submitted."""
        with self.phase("score"):
            return replace(rollout, rewards=self.queue().gather())

    def queue(self) -> RewardQueue:
        """The rewards of the run. Raises ConfigError where it has none."""
        if self.reward_queue is None:
            raise ConfigError("no rewards: add callbacks.reward_scoring.RewardScoring to trainer.callbacks")
        return self.reward_queue

    # ------------------------------------------------------------------ one iteration, served as an epoch, and its loss
    @property
    def warmup_steps(self) -> int:
        return self.supervised.warmup_steps if self.supervised else 0

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

    def micro_batches_of_step(self, *, warmup: bool) -> int:
        """Micro-batches of an optimizer step on each process."""
        return self.warmup_micro_batches if warmup else self.micro_batches_per_update + self.example_micro_batches

    def train_loader(self) -> ReplayLoader[R]:
        """The loader that the datamodule's `train_dataloader` returns."""
        self.accumulate()
        return ReplayLoader(self)

    def accumulate(self) -> None:
        """Have Lightning accumulate the gradients of as many micro-batches as an optimizer step of the current epoch has."""
        self.trainer.accumulate_grad_batches = self.micro_batches_of_step(warmup=self.warming_up)

    def current_rollout(self) -> R:
        """The rollout of the present iteration, made first if it is not there."""
        if self.rollout is None or self.rollout_iteration != self.iteration:
            self.rollout, self.rollout_iteration = self.iterate(), self.iteration
        self.rollout = self.rollout.to(self.device)  # a restored one was read before the model found its device
        return self.rollout

    @torch.no_grad()
    def iterate(self) -> R:
        """ask -> collect -> score -> credit, in evaluation mode and under the trainer's precision."""
        self.rollout = None  # free the previous one before the new one is built
        self.zero_grad()  # Lightning lets go of gradients only before the next backward
        was_training = self.training
        self.eval()
        rollout = self.rollout_with_rewards()
        self.train(was_training)
        rollout = self.credit(rollout)
        self.notify("on_rollout_end", rollout)
        return rollout

    def rollout_with_rewards(self) -> R:
        """ask -> collect -> score."""
        with self.rolling_out():
            rollout = self.collect(self.ask(self.iteration))
        return self.score(rollout)

    @contextmanager
    def rolling_out(self) -> Iterator[None]:
        """The phase "rollout", under the trainer's precision."""
        with self.phase("rollout"), self.trainer.precision_plugin.forward_context():
            yield

    def training_step(self, batch: Minibatch, batch_idx: int) -> Tensor:
        examples = isinstance(batch, Examples)
        terms = self.supervised_terms(batch) if isinstance(batch, Examples) else self.loss(batch)
        sums = {name: self.of_step(term.sum()) for name, term in terms.items()}
        loss = torch.stack([term.coef * sums[name] for name, term in terms.items()]).sum()
        if self.warming_up:
            self.step_meters.mean({"warmup/loss": loss})
            return loss
        share = (self.example_micro_batches if examples else self.micro_batches_per_update) / self.trainer.accumulate_grad_batches
        self.meters.mean({"loss": loss} | {f"{name}_loss": value * share for name, value in sums.items()})
        return loss

    def of_step(self, part: Tensor) -> Tensor:
        """A micro-batch's share of a step's sum, scaled so that the mean over micro-batches and processes is the sum."""
        return part * self.trainer.accumulate_grad_batches * self.trainer.world_size

    # ------------------------------------------------------------------ logging and optimization
    def report(self, values: Mapping[str, float], *, bar: Collection[str] = ()) -> None:
        """Log numbers of an epoch that are equal on all processes, see `Report`."""
        self.reported.add(self, values, bar=bar)

    def report_epoch(self) -> None:
        """Log the numbers of this epoch, which is over but for its last step. Collective."""
        self.report(self.meters.read(gather_objects) | self.rollout_metrics, bar=("reward_mean", "success"))

    def on_train_epoch_end(self) -> None:
        self.trainer.fit_loop.restarting = False  # else Lightning leaves out what a plateau's schedule does after this
        if self.meters:  # the iteration was cut short
            self.report_epoch()
        self.reported.log(self.trainer)

    def parameter_groups(self) -> list[Any]:
        """The trained parameters, or groups of them with settings of their own, for the optimizer."""
        return parameter_groups(self.policy)

    def configured_optimizer(self) -> Optimizer:
        """A new optimizer of the trained parameters."""
        return self.optimizer(self.parameter_groups())

    def configure_optimizers(self) -> Any:
        found = configured(optimizer := self.configured_optimizer(), self.lr_scheduler, self.supervised)
        self.resume.note_optimizer(optimizer)
        return found

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Leave out the step if its gradient is not finite, and log its numbers; after the last one, those of the epoch. Collective."""
        leave_out_not_finite(self, self.meters)
        report_step(self, self.step_meters)
        if self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:  # before any callback looks
            self.report_epoch()
            name_iteration(self.trainer, self.iteration + 1)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.resume.note_step(self)
        if self.warmup_steps and self.trainer.global_step == self.warmup_steps and not self.warming_up and batch_idx == 0:
            forget_moments(self.trainer.optimizers)
            self.policy.refresh_reference()

    # ------------------------------------------------------------------ the life of the models
    def models(self) -> Sequence[Shardable]:
        """Everything with trained weights: the policy, and what a method has beside it."""
        return [self.policy]

    def setup(self, stage: str) -> None:
        check_strategy(self.trainer.strategy)
        self.check_parts(stage)
        self.micro_batches_per_update = self.warmup_micro_batches = self.trainer.accumulate_grad_batches
        if stage == "fit":
            self.trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]  # see ReplayLoader
            self.check_geometry()
            self.accumulate()
        place, training = place_of(self.trainer), stage == "fit"
        load_policy(self.policy, place=place, drops=self.drops, training=training, method=type(self).__name__)

    def configure_model(self) -> None:
        shard_models(self.trainer.strategy, self.models())

    def configure_callbacks(self) -> list[L.Callback]:
        """None. Lightning asks before any callback is set up, which is the moment to refuse some."""
        check_callbacks(self.trainer.callbacks)  # type: ignore[attr-defined]
        return []

    def check_parts(self, stage: str) -> None:
        """Raise ConfigError where the run lacks a part that this method works with, before any model is loaded."""
        for kind in self.sources:
            self.source(kind)
        if stage == "fit":
            check_optimizer(self.optimizer, self.lr_scheduler, self.supervised)
            if self.reward_queue is None and self.needs_rewards():
                refuse_no_rewards(type(self).__name__)

    def check_geometry(self) -> None:
        """Raise ConfigError on sizes that do not divide, before any model is loaded."""
        check_trainer(self.trainer, warmup=self.warmup_steps > 0)
        check_divides(self.trainer.world_size, prompts_per_iteration=self.prompts_per_iteration)
        steps = ((epochs := self.trainer.max_epochs or -1) - self.warmup_epochs) * self.inner_epochs * self.updates
        check_length(self.optimizer, self.lr_scheduler, steps=steps, max_epochs=epochs)
        check_precision(str(self.trainer.precision), getattr(self.policy, "dtype", torch.float32))

    # ------------------------------------------------------------------ evaluation, checkpoints, and what a method asks others
    def on_validation_epoch_end(self) -> None:
        if not self.evaluated:
            return  # the run has no prompts of its own here
        rewards, batches, self.evaluated = self.queue().gather(), self.evaluated, []
        rewards, prompts = self.judged(rewards, batches), all_prompts(batches)
        for name, metrics in summaries(rewards, prompts, highest=self.queue().highest):
            self.report(metrics, bar=(name,) if name.count("/") == 1 else ())
        self.notify("on_evaluation_end", prompts, rewards)

    on_test_epoch_end = on_validation_epoch_end

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.resume.save(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.resume.load(self, checkpoint)

    def on_train_start(self) -> None:
        self.resume.go_on(self)

    def stored_options(self) -> dict[str, Any]:
        """Options that a stored rollout was made with: the method's and the policy's."""
        return {"model.class_path": type(self).__name__} | options_of(self, "model") | options_of(self.policy, "model.policy")

    def check_rollout(self, rollout: R) -> None:
        """Raise ConfigError where a restored rollout is not the one that this run would train on."""
        if self.asks_once:
            check_prompts(rollout.text, self.ask(self.rollout_iteration).text, iteration=self.rollout_iteration)

    @property
    def data(self) -> PromptSource:
        """The datamodule. Raises ConfigError where the run has none."""
        return datamodule_of(self.trainer, use=self.datamodules)

    def source(self, kind: Callable[..., S]) -> S:
        """The datamodule as a source of this kind. Raises ConfigError where it is none."""
        return source_of(self.data, kind, who=type(self).__name__, use=self.datamodules)

    def all_ranks(self, x: Tensor) -> Tensor:
        """Rows of every process, in order of rank, which may have different numbers of them. Collective."""
        return gather_rows(x.to(self.device)) if self.trainer.world_size > 1 else x

    def notify(self, hook: str, *args: Any) -> None:
        """Call a hook of every callback that has it, see `lit_rl.modules.hooks.notify`."""
        notify(self, hook, *args)

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Tell the callbacks when a phase ("rollout", "score", ...) starts and ends."""
        return phase(self, name)
