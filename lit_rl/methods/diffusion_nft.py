"""DiffusionNFT: reinforcement on the forward process, from finished samples alone (arXiv 2509.16117), and its relatives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from lit_rl.errors import ConfigError
from lit_rl.losses.flow import VelocityKL, gaussian_kl
from lit_rl.losses.masked import harmless, weighted_means
from lit_rl.losses.point_surrogates import NFT, Matching, PointSurrogate
from lit_rl.losses.terms import Term, Terms
from lit_rl.modules.conditions import FlowBatch, carried, conditioned, stored_conditions, trained_conditions
from lit_rl.modules.flow import LitFlow
from lit_rl.modules.pictures import denoise
from lit_rl.policies.base import FlowPolicy
from lit_rl.policies.weights.copies import OldPolicy
from lit_rl.replay.partition import places
from lit_rl.samplers.points import Points
from lit_rl.samplers.solvers import Sampler
from lit_rl.seeding import Key, generator
from lit_rl.types import Cond, FlowRollout, Prompts, take_rows


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
        sampler: Solver of the rollouts.
        points: Where on its way to noise a sample is trained.
        surrogate: Loss of a point, see `lit_rl.losses.point_surrogates`; default: `NFT`.
        kl: Divergence from the reference.
        kwargs: See `LitFlow` and `LitRL`. The loss is in units of `advantage.clip`.
    """

    stored_with: Sequence[str] = ("sampler", "points")
    presets: ClassVar[Mapping[str, PointSurrogate]] = {"surrogate": NFT()}

    def __init__(
        self,
        policy: FlowPolicy,
        *,
        sampler: Sampler | None = None,
        points: Points | None = None,
        surrogate: PointSurrogate | None = None,
        kl: VelocityKL | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(policy, **kwargs)
        self.sampler, self.points, self.kl = sampler or Sampler(), points or Points(), kl or VelocityKL()
        self.surrogate = surrogate or self.presets["surrogate"]
        self.check_reference(self.kl.coef)
        self.old_policy: OldPolicy | None = None  # set by the callback that keeps it

    def check_parts(self, stage: str) -> None:
        super().check_parts(stage)
        if stage == "fit" and self.old_policy is None:
            raise ConfigError(
                f"{type(self).__name__} needs callbacks.old_policy.OldPolicySync in trainer.callbacks; decay: copy is on-policy"
            )

    def on_fit_start(self) -> None:
        self.points.check(self.noise_levels)  # before anything is sampled
        super().on_fit_start()

    # ------------------------------------------------------------------ which points are trained
    def trained_steps(self) -> int:
        return self.points.count(self.num_steps)

    @cached_property
    def noise_levels(self) -> Tensor:
        """Sigmas of a rollout's steps, Float "N", from 1."""
        return self.sigmas(self.num_steps)[:-1].float()

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
        times = torch.stack([self.points.draw(self.noise_levels, generator(*key, "timesteps")) for key in keys]).to(self.device)
        return FlowRollout(
            prompts.group.to(self.device), prompts.info, logprobs=times[:, :0], mask=torch.ones_like(times, dtype=torch.bool),
            latents=torch.cat(clean)[:, None], times=times, cond=cond, cond_row=rows,
        )  # fmt: skip

    def sample(self, keys: Sequence[tuple[Key, ...]], cond: Cond) -> Tensor:
        """Clean latents "B *D" of the trajectories with these keys."""

        def noise(step: int) -> Tensor:
            return self.noise([(*key, step) for key in keys])

        start = self.noise([(*key, "start") for key in keys])
        solver, eta = self.sampler.solver, self.sampler.eta
        return denoise(self, start, cond, num_steps=self.num_steps, solver=solver, eta=eta, noise=noise if eta else None)

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
            **carried(rollout, b, s, used=used),
        )  # fmt: skip

    def loss(self, minibatch: PointBatch) -> Terms:  # type: ignore[override]
        """The surrogate + kl.coef mean (v - v_ref)^2, per pair."""
        assert self.old_policy is not None
        batch, old = minibatch, None
        at = batch.sigma.view(-1, *[1] * (batch.x0.ndim - 1))
        x = (1 - at) * batch.x0 + at * batch.noise
        if not self.old_policy.is_current:  # before the new forward, whose backward must find the weights untouched
            with torch.no_grad(), self.old_policy.acting():
                old = self.velocity(x, batch)
        new = self.velocity(x, batch)
        old = new.detach() if old is None else old
        losses, seen = self.surrogate(
            new, old, batch.advantages, x=x, x0=batch.x0, noise=batch.noise, sigma=batch.sigma, weights=batch.weights,
            adv_clip=self.credit_rule.clip,
        )  # fmt: skip
        self.meters.largest({name: seen.pop(name) for name in ("ratio_max_dev",) if name in seen})
        self.meters.mean(seen, weight=batch.weights.sum())
        terms = {"policy": Term(losses, batch.weights)}
        metrics = {"old_deviation": gaussian_kl(new, old, kind="v")}
        if self.kl.coef:
            with torch.no_grad(), self.policy.reference():
                ref = self.velocity(x, batch)
            metrics["kl_divergence"] = gaussian_kl(new, ref, kind="v")
            terms["kl"] = Term(metrics["kl_divergence"], batch.weights, self.kl.coef)
        self.meters.mean(weighted_means(metrics, batch.weights), weight=batch.weights.sum())
        return terms

    def velocity(self, x: Tensor, batch: PointBatch) -> Tensor:
        """Predicted dx/dt "N *D" at `x` by the weights that answer now; what these weights make of a prompt is computed anew."""
        cond = trained_conditions(self.policy, batch) if batch.cond is None else batch.cond
        return self.policy.velocity(x, batch.sigma, cond)


class AWM(DiffusionNFT):
    """Advantage-weighted matching: a clipped policy gradient whose log-probability is minus the matching error (arXiv 2509.25050).

    Args:
        surrogate: Loss of a point; default: `Matching`.
        kl: Divergence from the reference; default: none.
        kwargs: See `DiffusionNFT`.
    """

    presets: ClassVar[Mapping[str, PointSurrogate]] = {"surrogate": Matching()}
    defines: ClassVar = {"surrogate": Matching}

    def __init__(self, policy: FlowPolicy, *, surrogate: PointSurrogate | None = None, kl: VelocityKL | None = None, **kwargs: Any) -> None:
        super().__init__(policy, surrogate=surrogate, kl=kl or VelocityKL(coef=0.0), **kwargs)
