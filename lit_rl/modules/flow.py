"""The base of all methods on flow-matching image models: the policy's life, sampling, warm-up, evaluation and prediction."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lit_rl.credit.advantage import Advantage
from lit_rl.credit.groups import group_metrics, total_reward
from lit_rl.credit.row_weights import weights_of_rows
from lit_rl.errors import ConfigError
from lit_rl.losses.terms import Term, Terms
from lit_rl.modules.base import LitRL
from lit_rl.modules.checks import check_at_least, tell_noise
from lit_rl.modules.evaluation import count_not_finite, named
from lit_rl.modules.pictures import Evaluation, render
from lit_rl.modules.supervised import Supervised, policy_share
from lit_rl.policies.base import FlowPolicy
from lit_rl.replay.pairs import check_micro_batches, check_updates, micro_batches_within, sibling_numbers, split_pairs, split_steps
from lit_rl.samplers.schedules import Schedule
from lit_rl.seeding import Key, normal
from lit_rl.types import Examples, FlowRollout, Info, Prompts

StorageDtype = Literal["float32", "bfloat16", "float16"]

WHAT = "latents, log-probabilities or pixels"
"""Parts of a sample that must be finite."""


class LitFlow(LitRL[FlowRollout]):
    """Base of the methods on flow models.

    Args:
        policy: The model, e.g. `lit_rl.policies.sd3.SD3Policy`.
        num_steps: Denoising steps of a rollout (N).
        evaluation: Steps and seed of evaluation and prediction.
        rollout_micro_batch: Images denoised and decoded together; each finished batch is scored while the next one is sampled.
        updates_per_iteration: Optimizer steps of an iteration, over all its `inner_epochs` passes; None = one of each pass. Each takes an
            equal share of the pairs of its pass, the same ones whatever the number of processes and the size of micro-batches. `timestep`:
            one for each trained denoising step, of all samples' pairs there, from noise to data.
        train_micro_batch: (sample, step) pairs in one forward on one process, at most; a memory setting: `trainer.accumulate_grad_batches`
            becomes the number of micro-batches that an optimizer step needs. Warm-up examples count like pairs. None = that number is the
            trainer's, 1 if it says nothing.
        storage_dtype: Of the latents kept between rollout and training. A step is rounded through it before its log-probability.
        schedule: Sigmas of rollouts and evaluation.
        advantage: How rewards become advantages.
        supervised: Examples to imitate: a warm-up before the first rollout, or a share of every optimizer step.
        kwargs: See `LitRL`.
    """

    policy: FlowPolicy
    stored_with: Sequence[str] = ("num_steps", "schedule", "storage_dtype", "updates_per_iteration")

    def __init__(
        self,
        policy: FlowPolicy,
        *,
        num_steps: int = 10,
        evaluation: Evaluation | None = None,
        rollout_micro_batch: int = 8,
        updates_per_iteration: int | Literal["timestep"] | None = None,
        train_micro_batch: int | None = None,
        storage_dtype: StorageDtype = "float32",
        schedule: Schedule | None = None,
        advantage: Advantage | None = None,
        supervised: Supervised | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(policy, **kwargs)
        check_at_least(1, num_steps=num_steps, rollout_micro_batch=rollout_micro_batch)
        steps = None if updates_per_iteration == "timestep" else updates_per_iteration
        self.step_by_step = updates_per_iteration == "timestep"  # they are counted in `check_geometry`
        check_at_least(1, updates_per_iteration=steps, train_micro_batch=train_micro_batch)
        self.updates_per_iteration = steps or self.inner_epochs
        if self.updates_per_iteration % self.inner_epochs:
            raise ConfigError(
                f"model.updates_per_iteration={updates_per_iteration} must be a multiple of model.inner_epochs={self.inner_epochs}, as "
                "each pass over a rollout has as many as the others"
            )
        self.num_steps = num_steps
        self.evaluation = evaluation or Evaluation()
        self.rollout_micro_batch, self.train_micro_batch = rollout_micro_batch, train_micro_batch
        self.storage_dtype: torch.dtype = getattr(torch, storage_dtype)
        self.schedule = schedule or Schedule()
        self.credit_rule = advantage or Advantage()
        if self.group_size == 1 and self.credit_rule.kind not in ("history", "reinforce"):
            raise ConfigError(
                "model.group_size=1 gives every sample advantage 0, as there is no sibling to compare it with: use 4 to 24, or "
                "model.advantage.kind: history or reinforce"
            )
        self.tracker = self.credit_rule.tracker()
        self._told_noise = False
        self._finite: list[Tensor] = []  # of each sampled micro-batch Bool "B"
        self.supervised = supervised

    def on_fit_start(self) -> None:
        """Say what the numbers of the YAML multiply to."""
        steps = self.trained_steps()
        rank_zero_info(f"Sigmas of a rollout: {[round(sigma, 4) for sigma in self.sigmas(self.num_steps).tolist()]}")
        images, size = self.prompts_per_iteration * self.group_size, -(-self.pairs_of_update() // self.micro_batches_per_update)
        rank_zero_info(
            f"An iteration: {self.prompts_per_iteration} prompts x {self.group_size} samples = {images} images, x {steps} trained steps = "
            f"{images * steps} pairs; optimizer steps: {self.updates_per_iteration}, each of {self.micro_batches_per_update} micro-batches "
            f"of up to {size} pairs; processes: {self.trainer.world_size}"
        )

    # ------------------------------------------------------------------ sampling, and supervised examples
    def sigmas(self, num_steps: int) -> Tensor:
        """The configured schedule, Float64 "N+1", from 1 to 0."""
        return self.schedule.sigmas(num_steps, pipeline=self.policy.sigmas)

    def noise(self, keys: Sequence[tuple[Key, ...]]) -> Tensor:
        """Standard normal latents "B *D" on the device; row i is a function of `keys[i]`."""
        return normal(keys, self.policy.latent_shape(), self.device)

    def row_keys(self, prompts: Prompts) -> list[tuple[Key, ...]]:
        """The key from which the noise of each trajectory is drawn. It never holds its place in a micro-batch or on a rank."""
        iteration, numbered = self.iteration, zip(prompts.group.tolist(), sibling_numbers(prompts.group))
        return [(self.seed, "rollout", iteration, group, sibling) for group, sibling in numbered]

    def submit(self, x: Tensor, prompts: Prompts, chunk: Tensor, *, finite: Tensor | None = None) -> None:
        """Decode the clean latents of a finished micro-batch, submit them for scoring and tell the callbacks.

        finite: Bool "B", samples whose way there is finite; default: all.
        """
        (media, whole), info = self.policy.picture(x.float()), [prompts.info[i] for i in chunk]
        self._finite.append(whole if finite is None else whole & finite.cpu())
        self.queue().submit(media, info, groups=prompts.group[chunk].tolist())
        self.notify("on_rollout_chunk", media, info, len(prompts))

    def examples(self, step: int, part: int, parts: int) -> Examples:
        assert self.supervised is not None
        data, world = self.supervised.source(self.data), self.trainer.world_size
        return self.supervised.micro_batch(data, step, part * world + self.global_rank, parts * world).to(self.device)

    def supervised_terms(self, batch: Examples) -> Terms:
        assert self.supervised is not None
        losses = self.supervised.losses(self, batch)
        coef = self.supervised.coef if self.supervised.takes_part(self.iteration) else 0.0
        return {"supervised": Term(losses, batch.weights, 1.0 if self.warming_up else coef)}

    def check_parts(self, stage: str) -> None:
        super().check_parts(stage)
        if stage == "fit" and self.supervised is not None:
            self.supervised.source(self.data)
            self.supervised.check(self.policy)

    # ------------------------------------------------------------------ evaluation and prediction
    further_evaluation: Sequence[Sequence[Info]] = ()
    """Rows of further validation loaders with the number of theirs as `evaluation_set`; the callback that sets them renders them."""

    def validation_step(self, batch: Prompts, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any] | None:
        if "evaluation_set" in batch.info[0]:
            return None
        media, finite = render(self, batch)
        self.queue().submit(media, batch.info)
        self.evaluated.append(batch)
        self._finite.append(finite)
        return {"media": media, "prompts": batch}

    test_step = validation_step

    def on_validation_epoch_start(self) -> None:
        self._finite = []

    on_test_epoch_start = on_validation_epoch_start

    def judged(self, rewards: dict[str, Tensor], batches: Sequence[Prompts]) -> dict[str, Tensor]:
        real = torch.cat([batch.group.cpu() for batch in batches]) >= 0  # the rest fills up the last batches
        info = [row for batch in batches for row in batch.info]
        rewards, lost = self.scored_finite(rewards, ~real, info, where="evaluation")
        if lost:
            self.report({"val/non_finite": float(lost)})
        return rewards

    def predict_step(self, batch: Prompts, batch_idx: int) -> dict[str, Any]:
        media, finite = render(self, batch)
        lost = [str(batch.info[i]["prompt"]) for i in (~finite).nonzero()[:, 0].tolist() if batch.group[i] >= 0]
        if lost:
            warnings.warn(f"predict: pictures are not finite and show nothing ({WHAT}): {named(lost)}", stacklevel=2)
        return {"media": media, "prompts": batch}

    def check_geometry(self) -> None:
        if self.step_by_step:
            self.updates_per_iteration = self.inner_epochs * self.most_trained_steps()
        super().check_geometry()
        total = self.prompts_per_iteration * self.group_size * self.most_trained_steps()
        check_updates(total, updates=self.updates, passes=self.inner_epochs)
        if self.train_micro_batch is not None:
            self.set_micro_batches(self.train_micro_batch)
        if self.supervised is not None:
            self.set_example_micro_batches(self.supervised)
        check_micro_batches(self.pairs_of_update(), parts=self.micro_batches_per_update)

    def set_micro_batches(self, size: int) -> None:
        """Cut an optimizer step into micro-batches of at most `size` pairs, or as many as `accumulate_grad_batches` asks for beyond."""
        self.micro_batches_per_update = micro_batches_within(
            self.pairs_of_update(), size=size, present=self.trainer.accumulate_grad_batches, updates=self.updates_per_iteration
        )

    def set_example_micro_batches(self, supervised: Supervised) -> None:
        """Cut the examples of a step into micro-batches of at most `train_micro_batch`; without it a warm-up has as many as pairs have."""
        world = self.trainer.world_size
        needed = -(-supervised.batch_size // (world * (self.train_micro_batch or supervised.batch_size)))
        as_ever = isinstance(self.trainer.strategy, DeepSpeedStrategy)  # accumulates as many throughout a run
        takes_part = supervised.coef > 0 if as_ever else supervised.takes_part(max(0, self.iteration))
        self.example_micro_batches = needed if takes_part else 0
        if as_ever:
            self.warmup_micro_batches = self.micro_batches_of_step(warmup=False)
        elif self.train_micro_batch is not None:
            self.warmup_micro_batches = needed

    def accumulate(self) -> None:
        if self.supervised is not None:
            self.set_example_micro_batches(self.supervised)
        super().accumulate()

    def pairs_of_update(self) -> int:
        """(sample, step) pairs of an optimizer step on a process, at most."""
        pairs = self.prompts_per_iteration // self.trainer.world_size * self.group_size * self.most_trained_steps()
        return -(-pairs // self.updates)

    # ------------------------------------------------------------------ score and credit
    def rollout_with_rewards(self) -> FlowRollout:
        self._finite = []
        return super().rollout_with_rewards()

    def score(self, rollout: FlowRollout) -> FlowRollout:
        """As in the base class; what is not finite has no score."""
        rollout, place = super().score(rollout), f"iteration {self.iteration + 1}"
        nobody = torch.zeros(len(rollout), dtype=torch.bool)
        rewards, self.non_finite = self.scored_finite(rollout.rewards, nobody, rollout.info, where=place)
        return replace(rollout, rewards=rewards)

    def scored_finite(self, rewards: dict[str, Tensor], idle: Tensor, info: Sequence[Info], *, where: str) -> tuple[dict[str, Tensor], int]:
        """NaN for samples that are not finite, and how many these are on all processes. idle: Bool "B", those that do not count."""
        finite, self._finite = torch.cat(self._finite) | idle, []
        count = count_not_finite(finite, rewards, info, reward_queue=self.reward_queue, where=where, what=WHAT)
        return {name: values.where(finite, torch.nan) for name, values in rewards.items()}, count

    def check_reference(self, kl_coef: float) -> None:
        """Raise ConfigError on a divergence from the reference that the policy or the advantages do not allow."""
        if kl_coef and self.credit_rule.drop_zero:
            raise ConfigError("model.advantage.drop_zero would drop pairs that the divergence still trains: set one of them to its default")
        if kl_coef:
            self.policy.check_reference(after_warmup=self.warmup_steps > 0)

    def trained_pairs(self, rollout: FlowRollout) -> Tensor:
        """Bool "B S": the actions that are trained."""
        return rollout.mask

    def credit(self, rollout: FlowRollout) -> FlowRollout:
        """Advantages over the groups of all processes; weights so that each optimizer step is the mean over its pairs."""
        group, asked = self.all_ranks(rollout.group).cpu(), self.data.prompts(self.iteration, self.prompts_per_iteration)
        info = [asked[g] for g in group.tolist()]
        weights = weights_of_rows(info, self.queue().weights)
        rewards = {name: self.all_ranks(rollout.rewards[name].to(self.device)).cpu() for name in weights}
        total = total_reward(rewards, weights)
        prompts = [str(row["prompt"]) for row in info]
        values = self.credit_rule(rewards, total, group, weights=weights, prompts=prompts, tracker=self.tracker)

        before = int(self.all_ranks(torch.tensor([len(rollout)]))[: self.global_rank].sum())
        mine = slice(before, before + len(rollout))
        use = self.credit_rule.usable(rewards, total, weights=weights)[mine] & ((values[mine] != 0) | (not self.credit_rule.drop_zero))
        mask = self.trained_pairs(rollout) & use[:, None].to(self.device)
        count = self.all_ranks(mask.sum()[None]).sum()
        self.rollout_metrics = group_metrics(total, group) | {f"reward/{name}": float(r.nanmean()) for name, r in rewards.items()}
        self.rollout_metrics |= {"images": float(len(group)), "non_finite": float(self.non_finite)}
        self.rollout_metrics["trained_share"] = float(count / (mask.shape[1] * len(group)))
        advantages = values[mine, None].float().expand(mask.shape).to(self.device)
        share = (mask.shape[1] if self.step_by_step else self.updates) * policy_share(self.supervised, self.iteration)
        return replace(rollout, mask=mask, advantages=advantages, weights=mask.float() * share / count.clamp(min=1))

    # ------------------------------------------------------------------ minibatches of (sample, step) pairs
    @abstractmethod
    def trained_steps(self) -> int:
        """Trained steps of each trajectory in the current iteration (S)."""

    def most_trained_steps(self) -> int:
        """The largest number that `trained_steps` can be in any iteration."""
        return self.trained_steps()

    @property
    def updates(self) -> int:
        return self.updates_per_iteration // self.inner_epochs

    def split(self, rollout: FlowRollout, inner_epoch: int) -> list[Tensor]:
        """Minibatches of one pass, flat indices b * S + s of pairs, see `lit_rl.replay.pairs.split_pairs`."""
        assert rollout.weights is not None
        key = (self.seed, "split", self.iteration, inner_epoch)
        used, parts = (rollout.weights != 0).cpu(), self.micro_batches_per_update
        if self.step_by_step:
            return split_steps(used, updates=self.updates, parts=parts)
        return split_pairs(rollout.group.cpu(), used, key=key, updates=self.updates, parts=parts)

    def report_epoch(self) -> None:
        super().report_epoch()
        self._told_noise = self._told_noise or tell_noise(self, self.reported.unlogged, storage=self.storage_dtype)

    # ------------------------------------------------------------------ checkpoints
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.tracker is not None:
            checkpoint["prompt_history"] = self.tracker.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if self.tracker is not None and "prompt_history" in checkpoint:
            self.tracker.load_state_dict(checkpoint["prompt_history"])

    def restore_rollout(self, fields: dict[str, Any]) -> FlowRollout:
        return FlowRollout(**fields)
