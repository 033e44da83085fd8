"""The stations every method shares: ask -> collect -> score -> credit -> split -> loss, one rollout per Lightning epoch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Generic, TypeVar

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lit_rl.checkpoints.optimizer import check_same_optimizer
from lit_rl.checkpoints.options import REMEDY, options_of
from lit_rl.errors import ConfigError
from lit_rl.losses.terms import Term, Terms
from lit_rl.modules.checks import (
    check_at_least,
    check_callbacks,
    check_divides,
    check_precision,
    check_trainer,
    refuse_no_rewards,
)
from lit_rl.modules.evaluation import all_prompts, summaries
from lit_rl.modules.meters import Meters
from lit_rl.modules.models import Shardable, load_policy, shard_models
from lit_rl.modules.optimization import check_length, check_optimizer, configured, forget_moments
from lit_rl.modules.resume import Resume
from lit_rl.modules.supervised import Supervised
from lit_rl.policies.base import Policy
from lit_rl.ranks import gather_objects
from lit_rl.replay.loader import ReplayLoader
from lit_rl.replay.plan import Part, rollout_plan, warmup_plan
from lit_rl.replay.sources import ExampleSource, PromptSource, source_of
from lit_rl.rewards.base import Scorer
from lit_rl.seeding import generator
from lit_rl.strategies.checks import check_strategy
from lit_rl.types import Examples, Minibatch, Prompts, Rollout

R = TypeVar("R", bound=Rollout)
S = TypeVar("S")


class LitRL(L.LightningModule, ABC, Generic[R]):
    """Base of all methods. One epoch is one iteration is one rollout; epoch 0 is the supervised warm-up if there is one.

    Optimization is Lightning's automatic one, so accumulation, clipping, precision, schedulers, checkpoints and strategies keep their
    documented meaning. `training_step` returns the sum of the terms of `loss`, scaled so that after Lightning's division by
    `accumulate_grad_batches` and the strategy's mean over ranks the gradient is that of the global weighted sum.

    Args:
        policy: The model that is trained.
        prompts_per_iteration: Different prompts in one rollout, over all processes.
        group_size: Samples of each prompt (G).
        inner_epochs: Passes over a rollout.
        optimizer: E.g. `{class_path: torch.optim.AdamW, init_args: {lr: 3e-4}}`; its state restarts after a warm-up.
        lr_scheduler: Stepped once per optimizer step, counted from the end of a warm-up; `ReduceLROnPlateau` once per iteration.
        seed: Of rollouts, prompts order, minibatches and evaluation noise. The CLI sets it to `seed_everything`.
    """

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
        self.policy = policy
        self.prompts_per_iteration = prompts_per_iteration
        self.group_size = group_size
        self.inner_epochs = inner_epochs
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.seed = seed
        self.supervised: Supervised | None = None
        self.scorer: Scorer | None = None  # set by the callback that owns the rewards
        self.micro_batches_per_update = 1  # of an optimizer step, on each process; `setup` counts them
        self.example_micro_batches = 0  # beside those
        self.warmup_micro_batches = 1  # of a warm-up step
        self.rollout: R | None = None
        self.rollout_iteration = -1
        self.rollout_metrics: dict[str, float] = {}
        self.meters = Meters()  # of an epoch
        self.step_meters = Meters()  # of an optimizer step
        self.evaluated: list[Prompts] = []
        self.non_finite = 0  # samples of the last rollout, over all processes
        self.resume = Resume()

    policy: Policy
    samples, actions = "images", "pairs"
    """Plural nouns for the B rows of a rollout, and for its B times S actions."""

    stored_with: Sequence[str] = ("prompts_per_iteration", "group_size", "inner_epochs", "seed")
    """Options, beside those of its bases, that a rollout depends on after it was made: inside an iteration a run keeps them."""

    sources: Sequence[Callable[..., PromptSource]] = (PromptSource,)
    """Protocols of the datamodule that the method uses."""
    asks_once = True
    """A rollout's prompts are `ask(iteration)`, all of them or some."""
    datamodules: str = "datamodules.prompts.PromptFiles"
    """A datamodule that has them, for messages."""
    drops = False
    """Dropout, that of the model's settings and that of adapters, is active while the policy trains."""

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
        """Rows of each minibatch of one pass: `updates` times `micro_batches_per_update` of them."""

    @abstractmethod
    def minibatch(self, rollout: R, rows: Tensor) -> Minibatch:
        """The rows of a rollout that one forward needs, on `self.device`."""

    @abstractmethod
    def loss(self, minibatch: Minibatch) -> Terms:
        """The paper's loss as named terms, e.g. {"policy": Term(losses, weights), "kl": Term(kl, weights, coef=0.1)}."""

    @abstractmethod
    def restore_rollout(self, fields: dict[str, Any]) -> R:
        """The method's own dataclass from its plain fields."""

    def supervised_loss(self, batch: Examples) -> Tensor:
        """The loss of each example, where a method takes `supervised`."""
        raise ConfigError(f"{type(self).__name__} imitates no examples")

    # ------------------------------------------------------------------ ask and score
    def ask(self, iteration: int) -> Prompts:
        """This process's prompts of an iteration, every prompt `group_size` times in a row."""
        return self.draw(iteration, self.prompts_per_iteration)

    def draw(self, number: int, count: int) -> Prompts:
        """This process's share of draw `number` of `count` prompts."""
        info, ids = self.data.prompts(number, count), range(count)[self.local(count)]
        group = torch.tensor(ids, dtype=torch.long).repeat_interleave(self.group_size)
        return Prompts(group=group, info=[info[g] for g in group.tolist()])

    def score(self, rollout: R) -> R:
        """Await the rewards of everything that `collect` submitted."""
        with self.phase("score"):
            return replace(rollout, rewards=self.scores().gather())

    def scores(self) -> Scorer:
        """The rewards of the run. Raises ConfigError where it has none."""
        if self.scorer is None:
            raise ConfigError("no rewards: add callbacks.reward_scoring.RewardScoring to trainer.callbacks")
        return self.scorer

    # ------------------------------------------------------------------ one iteration, served as an epoch
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

    def train_loader(self) -> ReplayLoader:
        """The loader that the datamodule's `train_dataloader` returns."""
        self.accumulate()
        return ReplayLoader(self)

    def accumulate(self) -> None:
        """Have Lightning accumulate the gradients of as many micro-batches as an optimizer step of the current epoch has."""
        self.trainer.accumulate_grad_batches = self.micro_batches_of_step(warmup=self.warming_up)

    def minibatches_per_epoch(self) -> int:
        steps = self.warmup_steps if self.warming_up else self.inner_epochs * self.updates
        return steps * self.micro_batches_of_step(warmup=self.warming_up)

    def minibatches_done(self) -> int:
        return self.trainer.fit_loop.epoch_loop.batch_progress.current.processed  # type: ignore[attr-defined]

    def replay(self, indices: range) -> Iterator[Minibatch]:
        """The minibatches of the current epoch with these numbers, the rollout being made first if it is not there."""
        self.accumulate()
        if not self.warming_up:
            if self.rollout is None or self.rollout_iteration != self.iteration:
                self.rollout, self.rollout_iteration = self.iterate(), self.iteration
            self.rollout = self.rollout.to(self.device)  # a restored one was read before the model found its device
        plan = self.epoch_plan()
        for index in indices:
            yield self.serve(plan[index])

    def epoch_plan(self) -> Sequence[Part]:
        """The minibatches of the current epoch, in order."""
        if self.warming_up:
            return warmup_plan(steps=self.warmup_steps, micro_batches=self.warmup_micro_batches)
        assert self.rollout is not None
        rows = [rows for inner_epoch in range(self.inner_epochs) for rows in self.split(self.rollout, inner_epoch)]
        updates = self.inner_epochs * self.updates
        return rollout_plan(
            rows, updates=updates, examples=self.example_micro_batches, first=self.warmup_steps + self.iteration * updates
        )  # fmt: skip

    def serve(self, part: Part) -> Minibatch:
        """The minibatch of a part of the plan, on `self.device`."""
        if part.source == "rollout":
            assert self.rollout is not None
            return self.minibatch(self.rollout, part.rows)
        assert self.supervised is not None
        step, i = part.rows.tolist()
        parts = self.warmup_micro_batches if self.warming_up else self.example_micro_batches
        world = self.trainer.world_size
        return self.supervised.micro_batch(self.source(ExampleSource), step, i * world + self.global_rank, parts * world).to(self.device)

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

    # ------------------------------------------------------------------ loss
    def training_step(self, batch: Minibatch, batch_idx: int) -> Tensor:
        of_examples = isinstance(batch, Examples)
        terms = self.supervised_terms(batch) if isinstance(batch, Examples) else self.loss(batch)
        sums = {name: self.of_step(term.sum()) for name, term in terms.items()}
        loss = torch.stack([term.coef * sums[name] for name, term in terms.items()]).sum()
        if self.warming_up:
            self.step_meters.mean({"warmup/loss": loss})
            return loss
        share = (self.example_micro_batches if of_examples else self.micro_batches_per_update) / self.trainer.accumulate_grad_batches
        self.meters.mean({"loss": loss} | {f"{name}_loss": value * share for name, value in sums.items()})
        return loss

    def supervised_terms(self, batch: Examples) -> Terms:
        """The examples' loss; its coefficient is 1 in the warm-up."""
        assert self.supervised is not None
        return {"supervised": Term(self.supervised_loss(batch), batch.weights, 1.0 if self.warming_up else self.supervised.coef)}

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
        """Log the numbers of this optimizer step and, if it is the last one, those of the epoch. Collective."""
        if self.step_meters:
            for name, value in self.step_meters.read(gather_objects).items():
                self.log(name, value, on_step=True, on_epoch=False, prog_bar=True)
        if self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:  # before any callback looks
            # For names of checkpoints, as exports have them: `filename: "iteration-{iteration:.0f}"` of ModelCheckpoint; 0 is the warm-up.
            self.log("iteration", self.iteration + 1.0, on_step=True, on_epoch=False, logger=False)
            self.report_epoch()

    def report_epoch(self) -> None:
        self.report(self.meters.read(gather_objects) | self.rollout_metrics, bar=("reward_mean",))

    def on_train_epoch_end(self) -> None:
        self.trainer.fit_loop.restarting = False  # else Lightning leaves out what a plateau's schedule does after this
        if self.meters:  # the iteration was cut short
            self.report_epoch()

    def count_actions(self, batch: Minibatch) -> int:
        """Actions that a minibatch trains; examples are none."""
        return 0 if isinstance(batch, Examples) else batch.weights.numel()

    # ------------------------------------------------------------------ optimization
    def parameter_groups(self) -> list[Any]:
        """The trained parameters, or groups of them with settings of their own, for the optimizer."""
        return [p for p in self.parameters() if p.requires_grad]

    def configured_optimizer(self) -> Optimizer:
        """A new optimizer of the trained parameters."""
        return self.optimizer(self.parameter_groups())

    def configure_optimizers(self) -> Any:
        optimizer = self.configured_optimizer()
        found = configured(optimizer, self.lr_scheduler, self.supervised)
        self.resume.note_optimizer(optimizer)
        return found

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Leave out steps of gradients that are not finite: they would end in every weight. They are counted and told of.

        DeepSpeed keeps gradients to itself, so nothing is known of them here.
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
            self.resume.note_step(self)
        if self.warmup_steps and self.trainer.global_step == self.warmup_steps and not self.warming_up and batch_idx == 0:
            forget_moments(self.trainer.optimizers)
            self.policy.refresh_reference()

    # ------------------------------------------------------------------ the life of the models
    def models(self) -> Sequence[Shardable]:
        """Everything with trained weights: the policy, and what a method has beside it."""
        return [self.policy]

    def networks(self) -> Sequence[nn.Module]:
        """Every network with trained weights, each cut into shards as a whole."""
        return [network for model in self.models() for network in model.networks()]

    def setup(self, stage: str) -> None:
        check_strategy(self.trainer.strategy)
        self.check_parts(stage)
        self.micro_batches_per_update = self.warmup_micro_batches = self.trainer.accumulate_grad_batches
        if stage == "fit":
            self.trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]  # see ReplayLoader
            self.check_geometry()
            self.accumulate()
        load_policy(self.policy, drops=self.drops, training=stage == "fit", method=type(self).__name__)

    def configure_model(self) -> None:
        shard_models(self.trainer.strategy, self.models())

    def configure_callbacks(self) -> list[L.Callback]:
        """None. Lightning asks before any callback is set up, which is the moment to refuse some."""
        check_callbacks(self.trainer.callbacks)  # type: ignore[attr-defined]
        return []

    def needs_rewards(self) -> bool:
        """Rewards are part of the loss."""
        return True

    def check_parts(self, stage: str) -> None:
        """Raise ConfigError where the run lacks a part that this method works with, before any model is loaded."""
        for kind in self.sources:
            self.source(kind)
        if stage == "fit":
            check_optimizer(self.optimizer, self.lr_scheduler, self.supervised)
            if self.supervised:
                source_of(self.data, ExampleSource, who="model.supervised", use="datamodules.rendered_text.RenderedText or Inpainting")
            if self.scorer is None and self.needs_rewards():
                refuse_no_rewards(type(self).__name__)

    def check_geometry(self) -> None:
        """Raise ConfigError on sizes that do not divide, before any model is loaded."""
        check_trainer(self.trainer, warmup=self.warmup_steps > 0)
        world, epochs = self.trainer.world_size, self.trainer.max_epochs or -1
        check_divides(world, prompts_per_iteration=self.prompts_per_iteration)
        steps = (epochs - self.warmup_epochs) * self.inner_epochs * self.updates
        check_length(self.optimizer, self.lr_scheduler, steps=steps, max_epochs=epochs)
        check_precision(str(self.trainer.precision), getattr(self.policy, "dtype", torch.float32))

    # ------------------------------------------------------------------ evaluation
    def on_validation_epoch_end(self) -> None:
        rewards, batches = self.scores().gather(), self.evaluated
        self.evaluated = []
        rewards = self.judged(rewards, batches)
        prompts = all_prompts(batches)
        for name, metrics in summaries(rewards, prompts, highest=self.scores().highest):
            self.report(metrics, bar=(name,) if name.count("/") == 1 else ())
        self.notify("on_evaluation_end", prompts, rewards)

    on_test_epoch_end = on_validation_epoch_end

    def judged(self, rewards: dict[str, Tensor], batches: Sequence[Prompts]) -> dict[str, Tensor]:
        """Rewards of the evaluated samples, NaN where there is nothing to score."""
        return rewards

    # ------------------------------------------------------------------ checkpoints
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
        here = {str(row["prompt"]) for row in self.ask(self.rollout_iteration).info} if self.asks_once else None
        if here is not None and (other := [text for text in map(str, rollout.text) if text not in here]):
            raise ConfigError(
                f"data: the prompts of iteration {self.rollout_iteration} are others than those of the rollout in the checkpoint, "
                f"which was written inside that iteration (there: {other[0][:60]!r}): continue with the data it was written with, {REMEDY}"
            )

    def check_moments(self, stored: Mapping[str, Any]) -> None:
        """Raise ConfigError where the moments in a checkpoint are those of another optimizer. stored: `checkpoint["optimizer"]`."""
        if stored.get("groups"):
            check_same_optimizer(stored, self.configured_optimizer())

    # ------------------------------------------------------------------ small helpers
    @property
    def data(self) -> PromptSource:
        datamodule = getattr(self.trainer, "datamodule", None)
        if datamodule is None:
            raise ConfigError(f"the run has no data: give a datamodule, e.g. {self.datamodules}")
        return datamodule

    def source(self, kind: Callable[..., S]) -> S:
        """The datamodule as a source of this kind. Raises ConfigError where it is none."""
        return source_of(self.data, kind, who=type(self).__name__, use=self.datamodules)

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
