"""Pictures by deterministic sampling, of evaluation and prediction, and of methods that keep no path."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lit_rl.errors import ConfigError
from lit_rl.modules.conditions import conditioned
from lit_rl.policies.base import FlowPolicy
from lit_rl.samplers.flow import SDE, sde_path
from lit_rl.samplers.solvers import Solver, solve
from lit_rl.seeding import Key
from lit_rl.types import Cond, Info, Prompts, take_rows


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Evaluation and prediction by the deterministic Euler sampler.

    Args:
        num_steps: Denoising steps.
        guidance_scale: In place of the policy's, with which rollouts are made; default: that one.
        seed: Of the initial noise; image i of the evaluation set always starts from the same noise.
    """

    num_steps: int = 40
    guidance_scale: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.guidance_scale is not None and self.guidance_scale < 0:
            raise ConfigError(f"model.evaluation.guidance_scale={self.guidance_scale} must not be negative; 1 is no guidance")
        if self.num_steps < 1:
            raise ConfigError(f"model.evaluation.num_steps={self.num_steps} must be at least 1")


class Denoising(Protocol):
    """A flow method that samples."""

    policy: FlowPolicy
    rollout_micro_batch: int
    evaluation: Evaluation

    @property
    def device(self) -> torch.device: ...
    def sigmas(self, num_steps: int) -> Tensor: ...
    def noise(self, keys: Sequence[tuple[Key, ...]]) -> Tensor: ...


def denoise(
    method: Denoising,
    x: Tensor,
    cond: Cond,
    *,
    num_steps: int,
    solver: Solver = "ode",
    eta: float = 0.0,
    noise: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """From noise "B *D" to clean latents, see `lit_rl.samplers.solvers.solve`."""

    def velocity(x: Tensor, sigma: float) -> Tensor:
        return method.policy.velocity(x, torch.full((len(x),), sigma, device=method.device), cond)

    path = solve(velocity, x, sigmas=method.sigmas(num_steps).float(), solver=solver, eta=eta, noise=noise)
    return deque(path, maxlen=1).pop()


def render(method: Denoising, prompts: Prompts) -> tuple[Tensor, Tensor]:
    """Images uint8 "B 3 H W" (CPU) of the deterministic sampler, and Bool "B": the finite ones.

    The noise depends on `evaluation.seed` and the prompt's group id.
    """
    evaluation = method.evaluation
    keys = [(evaluation.seed, "eval", group) for group in prompts.group.tolist()]
    with guided(method.policy, evaluation.guidance_scale):
        return render_keyed(method, prompts.info, keys, num_steps=evaluation.num_steps)


def render_keyed(
    method: Denoising, info: Sequence[Info], keys: Sequence[tuple[Key, ...]], *, num_steps: int, sde: SDE | None = None
) -> tuple[Tensor, Tensor]:
    """Images of B prompts, each from the noise of its key, as `render` returns them. sde: Draw every step with it; None: none."""
    cond, rows = conditioned(method.policy, info, method.device)
    images: list[tuple[Tensor, Tensor]] = []
    for chunk in torch.arange(len(info)).split(method.rollout_micro_batch):
        given, mine = take_rows(cond, rows[chunk.to(method.device)]), [keys[i] for i in chunk]
        x = method.noise(mine)
        clean = denoise(method, x, given, num_steps=num_steps) if sde is None else _drawn(method, x, given, mine, num_steps, sde)
        images.append(method.policy.picture(clean))
    media, finite = zip(*images)
    return torch.cat(media), torch.cat(finite)


def _drawn(method: Denoising, x: Tensor, cond: Cond, keys: Sequence[tuple[Key, ...]], num_steps: int, sde: SDE) -> Tensor:
    """From noise "B *D" to clean latents by a path of random steps."""

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        return method.policy.velocity(x, sigma, cond)

    sigmas = method.sigmas(num_steps).float().to(method.device)
    path = sde_path(
        velocity, x, sigmas=sigmas, levels=[sde.noise_level] * num_steps, steps=range(num_steps), dynamics=sde.dynamics,
        sigma_max=float(sigmas[1]), noise=lambda i: method.noise([(*key, i) for key in keys]), dtype=torch.float32,
    )  # fmt: skip
    return deque(path, maxlen=1).pop().sample


@contextmanager
def guided(policy: FlowPolicy, scale: float | None) -> Iterator[None]:
    """Inside it the policy is guided by `scale`, or by its own where that is None."""
    own = policy.guidance_scale
    policy.guidance_scale = own if scale is None else scale
    try:
        yield
    finally:
        policy.guidance_scale = own
