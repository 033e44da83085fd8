"""Flow-GRPO: policy gradients on the denoising steps of a flow model (arXiv 2505.05470), and its relatives."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from lit_rl.errors import ConfigError
from lit_rl.losses.flow import FlowKL, gaussian_kl
from lit_rl.losses.masked import weighted_means
from lit_rl.losses.step_surrogates import Clip, Guard, StepSurrogate
from lit_rl.losses.terms import Term, Terms
from lit_rl.modules.conditions import trained_conditions
from lit_rl.modules.flow import LitFlow
from lit_rl.modules.paths import PairBatch, Plan, collect_paths, pair_batch
from lit_rl.policies.base import FlowPolicy
from lit_rl.replay.pairs import random_pairs
from lit_rl.samplers.flow import CPS, SDE, DanceSDE, RenoiseCPS, Step, sde_step
from lit_rl.samplers.windows import MixStrategy, full_window, mix_window, random_steps, random_window
from lit_rl.seeding import seed_of
from lit_rl.types import FlowRollout, Prompts


class FlowGRPO(LitFlow):
    """Clipped policy gradient on every step of a stochastic sampler, advantages relative to the group of the same prompt.

    Args:
        policy: The model that is trained. See `LitFlow`, as for `num_steps`, `rollout_micro_batch`, `train_micro_batch`, ...
        sde: Stochastic sampler of rollouts.
        timestep_fraction: Trained share of the steps, from the start; 0.99 leaves out the last one.
        surrogate: Loss of a step, see `lit_rl.losses.step_surrogates`; default: `Clip`.
        kl: Divergence from the reference.
        kwargs: See `LitFlow` and `LitRL`.
    """

    stored_with: Sequence[str] = ("sde", "timestep_fraction")

    def __init__(
        self, policy: FlowPolicy, *, sde: SDE | None = None, timestep_fraction: float = 0.99, surrogate: StepSurrogate | None = None,
        kl: FlowKL | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(policy, **kwargs)
        if not 0 < timestep_fraction <= 1:
            raise ConfigError(f"model.timestep_fraction={timestep_fraction} must be in (0, 1]; 0.99 leaves out the last step")
        self.timestep_fraction = timestep_fraction
        self.sde, self.surrogate, self.kl = sde or SDE(), surrogate or Clip(), kl or FlowKL()
        self.check_reference(self.kl.coef)

    # ------------------------------------------------------------------ which steps are actions
    def window(self, iteration: int) -> Sequence[int]:
        """Trained steps, rising."""
        return full_window(self.num_steps, fraction=self.timestep_fraction)

    def noise_levels(self, window: Sequence[int]) -> list[float]:
        """Noise level of each of the N steps."""
        return [self.sde.noise_level] * self.num_steps

    def trained_steps(self) -> int:
        return len(self.window(max(0, self.iteration)))

    def most_trained_steps(self) -> int:
        return len(self.window(0))  # MixGRPO's last windows are shorter

    @cached_property
    def sigma_max(self) -> float:
        """The schedule's second entry, read once: on the device it would cost a synchronisation per step."""
        return float(self.sigmas(self.num_steps)[1])

    # ------------------------------------------------------------------ collect
    def collect(self, prompts: Prompts) -> FlowRollout:
        """Denoise in micro-batches, keep the window's points, and submit each decoded micro-batch for scoring."""
        window, sigmas = self.window(self.iteration), self.sigmas(self.num_steps).float().to(self.device)
        plan = Plan(sigmas, self.noise_levels(window), window, self.sde, self.sigma_max, keep_means=self.surrogate.needs_means)
        return collect_paths(self, prompts, plan)

    def minibatch(self, rollout: FlowRollout, rows: Tensor) -> PairBatch:
        return pair_batch(self, rollout, rows)

    def loss(self, batch: PairBatch) -> Terms:  # type: ignore[override]
        """The surrogate and the divergence from the reference, per pair."""
        v = self.velocity(batch)
        step = self.replay_step(v, batch)
        losses, metrics = self.surrogate(
            step.logprob, batch.logprobs, batch.advantages, weights=batch.weights,
            mean=step.mean, old_mean=batch.means, noise_std=step.noise_std,
        )  # fmt: skip
        self.log_policy(metrics, batch.weights)
        terms = {"policy": Term(losses, batch.weights)}
        if self.kl.coef:
            with torch.no_grad(), self.policy.reference():
                ref_v = self.velocity(batch)
            divergence = self.divergence(v, step, ref_v, batch)
            self.meters.mean(weighted_means({"kl_divergence": divergence}, batch.weights), weight=batch.weights.sum())
            terms["kl"] = Term(divergence, batch.weights, self.kl.coef)
        return terms

    def velocity(self, batch: PairBatch) -> Tensor:
        """Predicted dx/dt "N *D" by the weights that answer now; what these weights make of a prompt is computed anew."""
        cond = trained_conditions(self.policy, batch) if batch.cond is None else batch.cond
        return self.policy.velocity(batch.x, batch.sigma, cond)

    def log_policy(self, metrics: dict[str, Tensor], weights: Tensor) -> None:
        """Means over the iteration; the largest deviation of the ratio from 1, and that of the first update, where it is an error."""
        deviation = metrics.pop("ratio_max_dev")
        self.meters.mean(metrics, weight=weights.sum())
        first = self.trainer.fit_loop.epoch_loop.batch_idx < self.trainer.accumulate_grad_batches
        self.meters.largest({"ratio_max_dev": deviation} | ({"ratio_first_update_max_dev": deviation} if first else {}))

    def replay_step(self, v: Tensor, batch: PairBatch) -> Step:
        """The stored action under today's velocity. Every trained step was drawn at `noise_level`."""
        return sde_step(
            batch.x, v, sigma=batch.sigma, sigma_next=batch.sigma_next,
            dynamics=self.sde.dynamics, noise_level=self.sde.noise_level, sigma_max=self.sigma_max, sample=batch.x_next,
        )  # fmt: skip

    def divergence(self, v: Tensor, step: Step, ref_v: Tensor, batch: PairBatch) -> Tensor:
        """Divergence from the reference, Float "N"."""
        if self.kl.of_velocities:
            return gaussian_kl(v, ref_v, kind=self.kl.kind, diffusion=step.diffusion, noise_std=step.noise_std)
        ref_mean = self.replay_step(ref_v, batch).mean
        return gaussian_kl(step.mean, ref_mean, kind=self.kl.kind, diffusion=step.diffusion, noise_std=step.noise_std)


class FlowGRPOFast(FlowGRPO):
    """Noise, and training, only in a random window of a few steps; the other steps are deterministic (Flow-GRPO-Fast).

    Args:
        window_size: Trained steps (w).
        window_range: The window lies in steps window_range[0] ... window_range[1] - 1; None = the first half.
        kwargs: See `FlowGRPO`. Published with cps at noise_level 0.8, clip 1e-5 and no KL.
    """

    stored_with: Sequence[str] = ("window_size", "window_range")
    presets: ClassVar = {"surrogate": Clip(low=1e-5, high=1e-5)}

    def __init__(
        self, policy: FlowPolicy, *, window_size: int = 3, window_range: tuple[int, int] | None = None,
        sde: CPS | None = None, surrogate: StepSurrogate | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(policy, sde=sde or CPS(), surrogate=surrogate or self.presets["surrogate"], **kwargs)
        self.window_size = window_size
        self.window_range = window_range or (0, max(window_size, self.num_steps // 2))
        if not (self.window_range[0] >= 0 and self.window_range[1] <= self.num_steps):
            raise ConfigError(f"model.window_range={list(self.window_range)} must lie in 0 ... model.num_steps={self.num_steps}")
        self.window(0)  # raises if the window does not fit

    def window(self, iteration: int) -> range:
        rng = random.Random(seed_of(self.seed, "window", iteration))
        return random_window(size=self.window_size, low=self.window_range[0], high=self.window_range[1], rng=rng)

    def noise_levels(self, window: Sequence[int]) -> list[float]:
        return [self.sde.noise_level if i in window else 0.0 for i in range(self.num_steps)]


class MixGRPO(FlowGRPO):
    """Noise, and training, only in a window that slides from noise to data as training goes on (arXiv 2507.21802).

    Args:
        window_size: Trained steps (w = 4 of 25).
        iterations_per_window: Iterations before the window moves (25).
        window_strategy: How it moves, see `lit_rl.samplers.windows.mix_window`.
        window_overlap: It moves by one step; otherwise by its size.
        kwargs: See `FlowGRPO`.
    """

    stored_with: Sequence[str] = ("window_size", "iterations_per_window", "window_strategy", "window_overlap")

    def __init__(
        self, policy: FlowPolicy, *, window_size: int = 4, iterations_per_window: int = 25, num_steps: int = 25,
        window_strategy: MixStrategy = "progressive", window_overlap: bool = True, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(policy, num_steps=num_steps, **kwargs)
        self.window_size, self.iterations_per_window, self.window_overlap = window_size, iterations_per_window, window_overlap
        self.window_strategy: MixStrategy = window_strategy
        self.window(0)  # raises if the window does not fit

    def window(self, iteration: int) -> range:
        return mix_window(
            iteration, num_steps=self.num_steps, size=self.window_size, iterations_per_window=self.iterations_per_window,
            strategy=self.window_strategy, overlap=self.window_overlap, seed=self.seed,
        )  # fmt: skip

    noise_levels = FlowGRPOFast.noise_levels


class DanceGRPO(FlowGRPO):
    """Constant noise at every step; each trajectory is trained on its own random 60 % of the steps before the last (arXiv 2505.07818).

    Args:
        trained_fraction: Share of the N - 1 steps.
        kwargs: See `FlowGRPO`. Published with siblings that start from the same noise.
    """

    stored_with: Sequence[str] = ("trained_fraction",)

    def __init__(self, policy: FlowPolicy, *, trained_fraction: float = 0.6, sde: DanceSDE | None = None, **kwargs: Any) -> None:
        super().__init__(policy, sde=sde or DanceSDE(), **kwargs)
        if not 0 < trained_fraction <= 1:
            raise ConfigError(f"model.trained_fraction={trained_fraction} must be in (0, 1]; DanceGRPO uses 0.6")
        self.trained_fraction = trained_fraction

    def noise_levels(self, window: Sequence[int]) -> list[float]:
        """The last step is deterministic unless it is trained: its end is then the predicted clean image, which DanceGRPO decodes."""
        last = self.num_steps - 1
        return [self.sde.noise_level] * last + [self.sde.noise_level if last in window else 0.0]

    def trained_pairs(self, rollout: FlowRollout) -> Tensor:
        return random_pairs(rollout.mask, fraction=self.trained_fraction, keys=[(*key, "trained") for key in self.row_keys(rollout)])


class RandomStepGRPO(FlowGRPO):
    """Noise at every step; each iteration trains a random share of them, the same steps of all its samples.

    Only the latents at which trained steps begin or end are kept. GRPO-Guard is `surrogate: lit_rl.losses.step_surrogates.Guard`.

    Args:
        timestep_fraction: Trained share of the N steps.
        last_step: The last step, which ends at the clean image, may be drawn too.
        sde: Stochastic sampler of rollouts; default: cps at noise_level 1, siblings starting from the same noise.
        kwargs: See `FlowGRPO`.
    """

    stored_with: Sequence[str] = ("last_step",)

    def __init__(
        self, policy: FlowPolicy, *, timestep_fraction: float = 0.6, last_step: bool = False, sde: RenoiseCPS | None = None, **kwargs: Any
    ) -> None:
        super().__init__(policy, sde=sde or RenoiseCPS(), timestep_fraction=timestep_fraction, **kwargs)
        self.last_step = last_step

    def window(self, iteration: int) -> Sequence[int]:
        rng = random.Random(seed_of(self.seed, "steps", iteration))
        return random_steps(self.num_steps, fraction=self.timestep_fraction, rng=rng, last=self.last_step)


class GRPOGuard(FlowGRPO):
    """The ratio is centred and scaled by the step's noise, so that one clip range fits all steps (arXiv 2510.22319).

    Published with advantages over the group's own standard deviation.
    """

    defines: ClassVar = {"surrogate": Guard}

    def __init__(self, policy: FlowPolicy, *, surrogate: StepSurrogate | None = None, **kwargs: Any) -> None:
        super().__init__(policy, surrogate=surrogate or Guard(), **kwargs)
