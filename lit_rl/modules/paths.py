"""Rollouts of stochastic denoising paths: `lit_rl.samplers.flow.sde_path` in micro-batches, of which a window is kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lit_rl.losses.masked import finite_rows, harmless
from lit_rl.modules.conditions import FlowBatch, carried, conditioned, stored_conditions
from lit_rl.modules.flow import LitFlow
from lit_rl.replay.pairs import first_siblings
from lit_rl.replay.partition import places
from lit_rl.samplers.flow import SDE, Step, sde_path
from lit_rl.seeding import Key
from lit_rl.types import Cond, FlowRollout, Prompts, take_rows


class PairBatch(FlowBatch):
    """N (sample, step) pairs: the action that went from `x` at `sigma` to `x_next` at `sigma_next`."""

    x: Tensor  # Float "N *D"
    x_next: Tensor  # Float "N *D"
    sigma: Tensor  # Float "N"
    sigma_next: Tensor  # Float "N"
    logprobs: Tensor  # Float "N"
    advantages: Tensor  # Float "N"
    means: Tensor | None  # Float "N *D", GRPO-Guard only


class Plan(NamedTuple):
    """The steps of an iteration's paths."""

    sigmas: Tensor  # Float "N+1", on the device
    levels: Sequence[float]  # noise level of each of the N steps
    window: Sequence[int]  # steps that are trained, rising
    sde: SDE
    sigma_max: float
    keep_means: bool

    @property
    def points(self) -> list[int]:
        """Numbers of the sigmas at which trained steps begin or end, rising."""
        return sorted({i for step in self.window for i in (step, step + 1)})


def collect_paths(method: LitFlow, prompts: Prompts, plan: Plan) -> FlowRollout:
    """Denoise in micro-batches, keep the window's points, and submit each decoded micro-batch for scoring."""
    cond, rows = conditioned(method.policy, prompts.info, method.device)
    keys = method.row_keys(prompts)
    starts, first = _starts(method, prompts, cond, rows, plan)
    parts: list[dict[str, Tensor]] = []
    for chunk in torch.arange(len(prompts)).split(method.rollout_micro_batch):
        here = [keys[i] for i in chunk.tolist()]
        x = method.noise([(*key, "start") for key in here]) if starts is None else starts[chunk.to(method.device)]
        part, clean = _denoise(method, x, take_rows(cond, rows[chunk.to(method.device)]), here, plan, first)
        method.submit(clean, prompts, chunk, finite=finite_rows(part["latents"]) & finite_rows(part["logprobs"]))
        parts.append(part)
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    begins = torch.tensor([plan.points.index(step) for step in plan.window], device=method.device).expand(len(prompts), -1)
    return FlowRollout(
        prompts.group.to(method.device), prompts.info, logprobs=whole["logprobs"], latents=whole["latents"], means=whole.get("means"),
        mask=torch.ones_like(whole["logprobs"], dtype=torch.bool), cond=cond, cond_row=rows,
        times=plan.sigmas[plan.points].expand(len(prompts), -1),
        streams={"begins": begins} if len(plan.points) > len(plan.window) + 1 else {},
    )  # fmt: skip


def pair_batch(method: LitFlow, rollout: FlowRollout, rows: Tensor) -> PairBatch:
    """The pairs of these rows, as `lit_rl.replay.pairs.split_pairs` names them; what has no weight is replaced by 0."""
    pairs, kept = places(rows.to(method.device))
    b, s = pairs // rollout.logprobs.shape[1], pairs % rollout.logprobs.shape[1]
    at = rollout.streams["begins"][b, s] if "begins" in rollout.streams else s  # there where steps are left out in between
    assert rollout.advantages is not None and rollout.weights is not None
    weights = rollout.weights[b, s].where(kept, 0.0)
    used = weights != 0
    return PairBatch(
        x=harmless(rollout.latents[b, at].float(), used), x_next=harmless(rollout.latents[b, at + 1], used),
        sigma=rollout.times[b, at], sigma_next=rollout.times[b, at + 1],
        logprobs=harmless(rollout.logprobs[b, s], used), advantages=rollout.advantages[b, s], weights=weights,
        means=None if rollout.means is None else harmless(rollout.means[b, s], used),
        **stored_conditions(method.policy, rollout, b, used=used), **carried(rollout, b, s, used=used),
    )  # fmt: skip


def _starts(method: LitFlow, prompts: Prompts, cond: Cond, rows: Tensor, plan: Plan) -> tuple[Tensor | None, int]:
    """The latents "B *D" at which siblings part ways, and the step that these are at.

    With `sde.same_latent` the deterministic steps before the window are the same for all siblings: they are computed once per group.
    """
    if not plan.sde.same_latent:
        return None, 0
    first = next((i for i, level in enumerate(plan.levels) if level), len(plan.levels))
    leaders, members = first_siblings(prompts.group)
    starts = []
    for chunk in leaders.split(method.rollout_micro_batch):
        x = method.noise([(method.seed, "start", method.iteration, int(prompts.group[i])) for i in chunk])
        for step in _path(method, x, take_rows(cond, rows[chunk.to(method.device)]), (), plan, range(first)):
            x = step.sample.float()
        starts.append(x)
    return torch.cat(starts)[members.to(method.device)], first


def _denoise(
    method: LitFlow, x: Tensor, cond: Cond, keys: Sequence[tuple[Key, ...]], plan: Plan, first: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Steps first ... N - 1 of one micro-batch: the window's points, log-probabilities (and means), and the clean latents."""
    x, points = x.to(method.storage_dtype), plan.points
    kept, logprobs, means = [x] if first in points else [], [], []
    for i, step in enumerate(_path(method, x, cond, keys, plan, range(first, len(plan.levels))), first):
        x = step.sample
        if i in plan.window:
            logprobs.append(step.logprob)
            means.append(step.mean)
        if i + 1 in points:
            kept.append(x)
    part = {"latents": torch.stack(kept, 1), "logprobs": torch.stack(logprobs, 1)}
    return part | ({"means": torch.stack(means, 1)} if plan.keep_means else {}), x


def _path(method: LitFlow, x: Tensor, cond: Cond, keys: Sequence[tuple[Key, ...]], plan: Plan, steps: range) -> Iterator[Step]:
    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        return method.policy.velocity(x, sigma, cond)

    def noise(i: int) -> Tensor:
        return method.noise([(*key, i) for key in keys])

    return sde_path(
        velocity, x, sigmas=plan.sigmas, levels=plan.levels, steps=steps, dynamics=plan.sde.dynamics, sigma_max=plan.sigma_max,
        noise=noise, dtype=method.storage_dtype,
    )  # fmt: skip
