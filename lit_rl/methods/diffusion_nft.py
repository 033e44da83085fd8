"""DiffusionNFT: reinforcement on the forward process, from finished samples alone (arXiv 2509.16117), and its relatives."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lit_rl.errors import ConfigError
from lit_rl.losses.flow import VelocityKL, gaussian_kl
from lit_rl.losses.masked import harmless, weighted_means
from lit_rl.losses.nft import AdvantageMode, MatchingWeight, matching_logprob, nft_loss, optimality
from lit_rl.losses.step_surrogates import Clip
from lit_rl.losses.terms import Term, Terms
from lit_rl.modules.conditions import FlowBatch, conditioned, stored_conditions, trained_conditions
from lit_rl.modules.flow import LitFlow
from lit_rl.modules.pictures import denoise
from lit_rl.policies.base import FlowPolicy
from lit_rl.policies.weights.copies import OldPolicy
from lit_rl.replay.partition import places
from lit_rl.samplers.schedules import shift_sigmas
from lit_rl.samplers.solvers import Solver
from lit_rl.seeding import Key, generator
from lit_rl.types import Cond, FlowRollout, Prompts, take_rows

Distribution = Literal["schedule", "uniform", "logit_normal"]


class PointBatch(FlowBatch):
    """N (sample, slot) pairs: a clean sample and where on its way to which noise it is looked at."""

    x0: Tensor  # Float "N *D"
    noise: Tensor  # Float "N *D"
    sigma: Tensor  # Float "N"
    advantages: Tensor  # Float "N"


class DiffusionNFT(LitFlow):
    """The old policy samples with any solver; good samples pull the new one, bad ones push it, both by how it predicts them noised afresh.

    Neither paths nor log-probabilities are kept: a rollout is one clean latent per sample. `callbacks.old_policy.OldPolicySync` holds the
    old policy. While it is known to be the very weights that are trained, its forward is left out: the new one's result is its result (with
    dropout, under the same mask). Guidance is the policy's; published with `guidance_scale: 1`, which halves the cost.

    Args:
        policy: The model that is trained. See `LitFlow`, as for `num_steps`, `rollout_micro_batch`, `train_micro_batch`, ...
        solver: Of the rollouts, see `lit_rl.samplers.solvers`.
        eta: Share of fresh noise in each step of solver ddim.
        beta: How far the compared policies are from the old one: 1 (GenEval), 0.1 (OCR, several rewards).
        adv_mode: What of an advantage is used, see `lit_rl.losses.nft.optimality`.
        timestep_fraction: Trained points per sample, as a share of `num_steps`; 0.99 leaves out one.
        timesteps: Where they are: points of the rollout's schedule, every sample in its own random order; or drawn from a distribution.
        timestep_range: Smallest and largest sigma that is trained. (0.5, 1) and `timestep_fraction` 0.3: a few points of the noisy half.
        timestep_shift: Of drawn sigmas, s u / (1 + (s - 1) u): above 1 towards noise. The schedule has its own.
        kl: Divergence from the reference.
        kwargs: See `LitFlow` and `LitRL`. The loss is in units of `advantage.clip`.
    """

    stored_with: Sequence[str] = ("solver", "eta", "timestep_fraction", "timesteps", "timestep_range", "timestep_shift")

    def __init__(
        self,
        policy: FlowPolicy,
        *,
        solver: Solver = "dpm2",
        eta: float = 0.0,
        beta: float = 1.0,
        adv_mode: AdvantageMode = "normal",
        timestep_fraction: float = 0.99,
        timesteps: Distribution = "schedule",
        timestep_range: tuple[float, float] = (0.0, 1.0),
        timestep_shift: float = 1.0,
        kl: VelocityKL | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(policy, **kwargs)
        self.kl = kl or VelocityKL()
        self.check_reference(self.kl.coef)
        _check(solver=solver, eta=eta, beta=beta, timestep_fraction=timestep_fraction)
        if not 0 <= timestep_range[0] < timestep_range[1] <= 1 or timestep_shift <= 0:
            raise ConfigError(
                f"model.timestep_range={list(timestep_range)} must rise within [0, 1], model.timestep_shift={timestep_shift} be above 0"
            )
        self.solver, self.eta, self.beta, self.adv_mode, self.timesteps = solver, eta, beta, adv_mode, timesteps
        self.timestep_fraction, self.timestep_range, self.timestep_shift = timestep_fraction, timestep_range, timestep_shift
        self.old_policy: OldPolicy | None = None  # set by the callback that keeps it

    def check_parts(self, stage: str) -> None:
        super().check_parts(stage)
        if stage == "fit" and self.old_policy is None:
            raise ConfigError(
                f"{type(self).__name__} needs callbacks.old_policy.OldPolicySync in trainer.callbacks; decay: copy is on-policy"
            )

    def on_fit_start(self) -> None:
        if self.timesteps == "schedule":
            _ = self.candidates  # raises before anything is sampled
        super().on_fit_start()

    # ------------------------------------------------------------------ which points are trained
    def trained_steps(self) -> int:
        return max(1, int(self.num_steps * self.timestep_fraction))

    @cached_property
    def candidates(self) -> Tensor:
        """The schedule's sigmas within `timestep_range`, Float "n", at least as many as are trained."""
        sigmas = self.sigmas(self.num_steps)[:-1].float()
        inside = sigmas[(sigmas >= self.timestep_range[0]) & (sigmas <= self.timestep_range[1])]
        if len(inside) < self.trained_steps():
            raise ConfigError(
                f"model.timestep_fraction={self.timestep_fraction} asks for {self.trained_steps()} points of {self.num_steps}, and "
                f"model.timestep_range={list(self.timestep_range)} holds {len(inside)}: lower the first or widen the second; the schedule "
                f"is {[round(s, 3) for s in sigmas.tolist()]}"
            )
        return inside

    def trained_sigmas(self, key: tuple[Key, ...]) -> Tensor:
        """Times at which the sample of this key is trained, Float "S"."""
        draw, count = generator(*key, "timesteps"), self.trained_steps()
        if self.timesteps == "schedule":
            return self.candidates[torch.randperm(len(self.candidates), generator=draw)[:count]]
        u = torch.rand(count, generator=draw) if self.timesteps == "uniform" else torch.randn(count, generator=draw).sigmoid()
        low, high = self.timestep_range
        return low + (high - low) * shift_sigmas(u, shift=self.timestep_shift)

    # ------------------------------------------------------------------ collect
    def collect(self, prompts: Prompts) -> FlowRollout:
        """Denoise with the old policy in micro-batches, keep the clean latents, and submit each decoded micro-batch for scoring."""
        assert self.old_policy is not None
        cond, rows = conditioned(self.policy, prompts.info, self.device)
        clean, keys = [], self.row_keys(prompts)
        with self.old_policy.acting():
            for chunk in torch.arange(len(prompts)).split(self.rollout_micro_batch):
                x = self.sample([keys[i] for i in chunk.tolist()], take_rows(cond, rows[chunk.to(self.device)])).to(self.storage_dtype)
                self.submit(x, prompts, chunk)
                clean.append(x)
        times = torch.stack([self.trained_sigmas(key) for key in keys]).to(self.device)
        return FlowRollout(
            prompts.group.to(self.device), prompts.info, logprobs=times[:, :0], mask=torch.ones_like(times, dtype=torch.bool),
            latents=torch.cat(clean)[:, None], times=times, cond=cond, cond_row=rows,
        )  # fmt: skip

    def sample(self, keys: Sequence[tuple[Key, ...]], cond: Cond) -> Tensor:
        """Clean latents "B *D" of the trajectories with these keys."""

        def noise(step: int) -> Tensor:
            return self.noise([(*key, step) for key in keys])

        start = self.noise([(*key, "start") for key in keys])
        return denoise(self, start, cond, num_steps=self.num_steps, solver=self.solver, eta=self.eta, noise=noise if self.eta else None)

    # ------------------------------------------------------------------ loss
    def split(self, rollout: FlowRollout, inner_epoch: int) -> list[Tensor]:
        """As in the base class; rows also say which pass they are of, because each pass draws noises of its own."""
        before = inner_epoch * rollout.mask.numel()
        return [torch.where(rows < 0, rows - before, rows + before) for rows in super().split(rollout, inner_epoch)]

    def minibatch(self, rollout: FlowRollout, rows: Tensor) -> PointBatch:
        assert rollout.advantages is not None and rollout.weights is not None
        rows, kept = places(rows)
        inner_epoch, pair = rows // rollout.mask.numel(), rows % rollout.mask.numel()
        row, slot = pair // rollout.mask.shape[1], pair % rollout.mask.shape[1]
        keys, looked_at = self.row_keys(rollout), zip(row.tolist(), slot.tolist(), inner_epoch.tolist())
        noise = self.noise([(*keys[b], "forward", s, epoch) for b, s, epoch in looked_at])
        b, s = row.to(self.device), slot.to(self.device)
        weights = rollout.weights[b, s].where(kept.to(self.device), 0.0)
        used = weights != 0
        return PointBatch(
            x0=harmless(rollout.latents[b, 0].float(), used), noise=noise, sigma=rollout.times[b, s],
            advantages=rollout.advantages[b, s], weights=weights, **stored_conditions(self.policy, rollout, b, used=used),
        )  # fmt: skip

    def loss(self, minibatch: PointBatch) -> Terms:  # type: ignore[override]
        """The policy loss + kl.coef mean (v - v_ref)^2, per pair."""
        assert self.old_policy is not None
        batch, old = minibatch, None
        at = batch.sigma.view(-1, *[1] * (batch.x0.ndim - 1))
        x = (1 - at) * batch.x0 + at * batch.noise
        if not self.old_policy.is_current:  # before the new forward, whose backward must find the weights untouched
            with torch.no_grad(), self.old_policy.acting():
                old = self.velocity(x, batch)
        new = self.velocity(x, batch)
        old = new.detach() if old is None else old
        terms = {"policy": Term(self.policy_loss(new, old, x, batch), batch.weights)}
        metrics = {"old_deviation": gaussian_kl(new, old, kind="v")}
        if self.kl.coef:
            with torch.no_grad(), self.policy.reference():
                ref = self.velocity(x, batch)
            metrics["kl"] = gaussian_kl(new, ref, kind="v")
            terms["kl"] = Term(metrics["kl"], batch.weights, self.kl.coef)
        self.meters.mean(weighted_means(metrics, batch.weights), weight=batch.weights.sum())
        return terms

    def velocity(self, x: Tensor, batch: PointBatch) -> Tensor:
        """Predicted dx/dt "N *D" at `x` by the weights that answer now; what these weights make of a prompt is computed anew."""
        cond = trained_conditions(self.policy, batch) if batch.cond is None else batch.cond
        return self.policy.velocity(x, batch.sigma, cond)

    def policy_loss(self, new: Tensor, old: Tensor, x: Tensor, batch: PointBatch) -> Tensor:
        """The policy loss of each pair."""
        clip = self.credit_rule.clip
        r = optimality(batch.advantages, clip=clip, mode=self.adv_mode)
        return nft_loss(new, old, x=x, x0=batch.x0, sigma=batch.sigma, r=r, beta=self.beta, scale=clip).policy


class AWM(DiffusionNFT):
    """Advantage-weighted matching: a clipped policy gradient whose log-probability is minus the matching error (arXiv 2509.25050).

    Args:
        matching_weight: How the matching error of a time counts in that log-probability, see `lit_rl.losses.nft.matching_logprob`.
        power: Exponent of that weight, likewise.
        surrogate: Clip range of the ratio to the old policy.
        kl: Divergence from the reference; default: none.
        kwargs: See `DiffusionNFT`; `beta` and `adv_mode` have no part in it.
    """

    presets: ClassVar = {"surrogate": Clip(low=1e-2, high=1e-2)}

    def __init__(
        self,
        policy: FlowPolicy,
        *,
        matching_weight: MatchingWeight = "ghuber",
        power: float = 0.25,
        surrogate: Clip | None = None,
        kl: VelocityKL | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(policy, kl=kl or VelocityKL(coef=0.0), **kwargs)
        self.matching_weight, self.power, self.surrogate = matching_weight, power, surrogate or self.presets["surrogate"]
        if self.surrogate.needs_means:
            raise ConfigError("model.surrogate of AWM is lit_rl.losses.step_surrogates.Clip: its ratio is not that of a step with noise")

    def policy_loss(self, new: Tensor, old: Tensor, x: Tensor, batch: PointBatch) -> Tensor:
        logprob, before = (
            matching_logprob(v, batch.x0, batch.noise, sigma=batch.sigma, weight=self.matching_weight, power=self.power) for v in (new, old)
        )
        losses, metrics = self.surrogate(
            logprob, before, batch.advantages, weights=batch.weights, mean=new, old_mean=None, noise_std=torch.ones_like(logprob)
        )
        self.meters.largest({"ratio_max_dev": metrics.pop("ratio_max_dev")})
        self.meters.mean(metrics, weight=batch.weights.sum())
        return losses


def _check(*, solver: Solver, eta: float, beta: float, timestep_fraction: float) -> None:
    if not 0 <= eta <= 1 or (eta and solver != "ddim"):
        raise ConfigError(f"model.eta={eta} is the noise of model.solver=ddim, in [0, 1]; for solver {solver} set it to 0")
    if beta <= 0:
        raise ConfigError(f"model.beta={beta} must be above 0; DiffusionNFT uses 0.1 ... 1")
    if not 0 < timestep_fraction <= 1:
        raise ConfigError(f"model.timestep_fraction={timestep_fraction} must be in (0, 1]; 0.99 leaves out one point")
