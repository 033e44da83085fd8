"""One denoising step of a flow model as an action: where it goes, how sure the policy was of it.

Notation: sigma in [0, 1], 1 = noise, 0 = data; x = (1 - sigma) x0 + sigma eps; the network's output is the velocity v = eps - x0, so
x0_hat = x - sigma v and eps_hat = x + (1 - sigma) v. A step goes from sigma to sigma_next < sigma; dt = sigma_next - sigma < 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from lit_rl.errors import ConfigError

Dynamics = Literal["flow_sde", "dance_sde", "cps", "wan_sde", "ode"]
"""flow_sde: Flow-GRPO (arXiv 2505.05470). dance_sde: DanceGRPO (2505.07818). cps: coefficients-preserving (2509.05952).
wan_sde: Flow-GRPO's video variant. ode: Euler, nothing to learn from."""

DYNAMICS: tuple[str, ...] = get_args(Dynamics)


@dataclass(frozen=True, kw_only=True)
class SDE:
    """A stochastic sampler.

    Args:
        dynamics: Its kind. With `cps` images stay clean at any noise level; its log-probabilities are smaller, so clip less.
        noise_level: a of `sde_step` (flow_sde 0.7, FLUX 0.9; cps 0.8, in [0, 1]; dance_sde 0.3).
        same_latent: Siblings start from the same noise, as in DanceGRPO, and share the deterministic steps before the window.
    """

    dynamics: Dynamics = "flow_sde"
    noise_level: float = 0.7
    same_latent: bool = False

    def __post_init__(self) -> None:
        if self.dynamics == "ode":
            raise ConfigError(
                "model.sde.dynamics=ode takes no random steps, so there is nothing to learn from; use flow_sde, cps or dance_sde"
            )
        if self.noise_level <= 0 or (self.dynamics == "cps" and self.noise_level > 1):
            most = " and at most 1 for cps" if self.dynamics == "cps" else ""
            raise ConfigError(f"model.sde.noise_level={self.noise_level} must be above 0{most}")


@dataclass(frozen=True, kw_only=True)
class CPS(SDE):
    """The sampler of Flow-GRPO-Fast: images stay clean at any noise level.

    Args:
        dynamics: Its kind, see `SDE`.
        noise_level: a of `sde_step`, see `SDE`.
        same_latent: Siblings start from the same noise, see `SDE`.
    """

    dynamics: Dynamics = "cps"
    noise_level: float = 0.8


@dataclass(frozen=True, kw_only=True)
class DanceSDE(SDE):
    """The sampler of DanceGRPO: constant noise, and siblings that start from the same one.

    Args:
        dynamics: Its kind, see `SDE`.
        noise_level: a of `sde_step`, see `SDE`.
        same_latent: Siblings start from the same noise, see `SDE`.
    """

    dynamics: Dynamics = "dance_sde"
    noise_level: float = 0.3
    same_latent: bool = True


@dataclass(frozen=True, kw_only=True)
class RenoiseCPS(SDE):
    """The sampler of DeepGen-RL: each step predicts the clean image and adds fresh noise of the next sigma to it.

    Args:
        dynamics: Its kind, see `SDE`.
        noise_level: a of `sde_step`, see `SDE`.
        same_latent: Siblings start from the same noise, see `SDE`.
    """

    dynamics: Dynamics = "cps"
    noise_level: float = 1.0
    same_latent: bool = True


class Step(NamedTuple):
    """A step of the whole batch. A row without noise has noise_std = 0, sample = mean (rounded) and logprob = 0."""

    sample: Float[Tensor, "B *D"]  # x' at sigma_next, in the storage dtype; detached
    mean: Float[Tensor, "B *D"]  # carries the gradient of v
    noise_std: Float[Tensor, "B"]  # standard deviation of the fresh noise in x'
    diffusion: Float[Tensor, "B"]  # g(sigma); noise_std / sqrt(-dt) for cps, which has no g of its own
    logprob: Float[Tensor, "B"]  # mean over *D, not the sum: clip ranges are therefore 1e-5 ... 1e-3


def sde_step(
    x: Float[Tensor, "B *D"],
    v: Float[Tensor, "B *D"],
    *,
    sigma: Float[Tensor, "B"],
    sigma_next: Float[Tensor, "B"],
    dynamics: Dynamics,
    noise_level: float | Float[Tensor, "B"],
    sigma_max: float,
    noise: Float[Tensor, "B *D"] | None = None,
    sample: Float[Tensor, "B *D"] | None = None,
    dtype: torch.dtype | None = None,
) -> Step:
    """x' = x + v dt + k eps_hat + noise_std z: draw it from `noise`, or score a given `sample`.

    - flow_sde: g = a sqrt(sigma / (1 - sigma*)), k = g^2 dt / (2 sigma), noise_std = g sqrt(-dt); sigma* = sigma_max where sigma is 1
    - dance_sde: g = a; wan_sde: g = a sigma_max sigma (published with a = 1); the rest as flow_sde
    - cps: noise_std = sigma' sin(a pi / 2), k = sigma' (cos(a pi / 2) - 1), which keeps the noise in x' at exactly sigma'
    - ode: k = noise_std = 0; takes neither noise nor sample

    logprob is the mean over latent elements of log N(sample; mean, noise_std^2); for cps of -(sample - mean)^2, as published: without
    1 / (2 noise_std^2) and constants. Rows with noise_level 0 step like ode, whatever the dynamics, with logprob 0.

    Args:
        sigma, sigma_next: one pair per row, sigma in (0, 1], 0 <= sigma_next < sigma.
        noise_level: a above, for all rows or one per row. cps: in [0, 1].
        sigma_max: the schedule's second entry, in [0, 1).
        noise: standard normal z, to draw x'.
        sample: an x' that was drawn earlier, to score it (training). Exactly one of noise and sample.
        dtype: storage dtype of the drawn x'. It is rounded through it *before* its log-probability, so that scoring the stored sample
            later gives the very same number. Default: the dtype of the mathematics.

    The mathematics is in float32, or float64 if x or v are: bfloat16 overflows here.
    """
    _check(dynamics, noise=noise, sample=sample, noise_level=noise_level, sigma_max=sigma_max)
    work = torch.promote_types(torch.promote_types(x.dtype, v.dtype), torch.float32)
    x, v, sigma, sigma_next = x.to(work), v.to(work), sigma.to(work), sigma_next.to(work)
    level = noise_level.to(work) if isinstance(noise_level, Tensor) else x.new_full((len(x),), noise_level, dtype=work)
    diffusion, noise_std, pull = _coefficients(sigma, sigma_next, level, dynamics=dynamics, sigma_max=sigma_max)
    mean = x + v * _rows(sigma_next - sigma, x) + (x + v * _rows(1 - sigma, x)) * _rows(pull, x)
    if sample is None:
        drawn = mean if noise is None else mean + noise.to(work) * _rows(noise_std, x)
        sample = drawn.detach().to(dtype or work)
    sample = sample.detach()
    return Step(sample, mean, noise_std, diffusion, _logprob(sample.to(work), mean, noise_std, level, dynamics))


def sde_path(
    velocity: Callable[[Tensor, Tensor], Tensor],
    x: Float[Tensor, "B *D"],
    *,
    sigmas: Float[Tensor, "n"],
    levels: Sequence[float],
    steps: range,
    dynamics: Dynamics,
    sigma_max: float,
    noise: Callable[[int], Tensor],
    dtype: torch.dtype,
) -> Iterator[Step]:
    """Some consecutive steps of a denoising path, each drawn with `sde_step`, or deterministic where its level is 0.

    Args:
        velocity: v at (x, sigma), sigma Float "B".
        sigmas: N + 1 of them, falling, on the device of x.
        levels: Noise level of each of the N steps.
        steps: Numbers of the steps that are taken, x being at `sigmas[steps.start]`.
        noise: Standard normal "B *D" for step i; asked for where the level of i is above 0.
        dtype: Storage dtype of every sample, see `sde_step`.
    """
    x = x.float()
    for i in steps:
        sigma, sigma_next = sigmas[i].expand(len(x)), sigmas[i + 1].expand(len(x))
        step = sde_step(
            x, velocity(x, sigma), sigma=sigma, sigma_next=sigma_next, dynamics=dynamics if levels[i] else "ode", noise_level=levels[i],
            sigma_max=sigma_max, noise=noise(i) if levels[i] else None, dtype=dtype,
        )  # fmt: skip
        x = step.sample.float()
        yield step


def _coefficients(
    sigma: Float[Tensor, "B"],
    sigma_next: Float[Tensor, "B"],
    level: Float[Tensor, "B"],
    *,
    dynamics: Dynamics,
    sigma_max: float,
) -> tuple[Float[Tensor, "B"], Float[Tensor, "B"], Float[Tensor, "B"]]:
    """(g, noise_std, k): the coefficients of noise and eps_hat in `sde_step`."""
    root = (sigma - sigma_next).sqrt()
    if dynamics == "ode":
        zero = torch.zeros_like(sigma)
        return zero, zero, zero
    if dynamics == "cps":
        angle = level * (math.pi / 2)
        noise_std = sigma_next * angle.sin()
        return noise_std / root, noise_std, sigma_next * (angle.cos() - 1)
    if dynamics == "flow_sde":
        diffusion = level * (sigma / (1 - torch.where(sigma >= 1, sigma_max, sigma))).sqrt()
    elif dynamics == "dance_sde":
        diffusion = level
    else:
        diffusion = level * sigma_max * sigma
    return diffusion, diffusion * root, -(diffusion**2) * root**2 / (2 * sigma)


def _logprob(
    sample: Float[Tensor, "B *D"], mean: Float[Tensor, "B *D"], noise_std: Float[Tensor, "B"], level: Float[Tensor, "B"], dynamics: Dynamics
) -> Float[Tensor, "B"]:
    """Per-element log-density of `sample`. The dividing rows are made safe on both sides of `where`, so no NaN reaches a gradient."""
    square = (sample - mean).pow(2).flatten(1).mean(1)
    if dynamics == "cps":
        # A level above 0 keeps the last step (noise_std 0) in: upstream scores it too, and -(x' - mean)^2 is finite there.
        return torch.where(level > 0, -square, 0.0)
    noisy = noise_std > 0
    std = torch.where(noisy, noise_std, 1.0)
    return torch.where(noisy, -square / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi), 0.0)


def _rows(value: Float[Tensor, "B"], like: Float[Tensor, "B *D"]) -> Tensor:
    """A number per row, shaped to broadcast over `like`."""
    return value.view(-1, *[1] * (like.ndim - 1))


def _check(dynamics: str, *, noise: Tensor | None, sample: Tensor | None, noise_level: float | Tensor, sigma_max: float) -> None:
    if dynamics not in DYNAMICS:
        raise ValueError(f"dynamics {dynamics!r} is unknown; choose one of {', '.join(DYNAMICS)}")
    given = (noise is not None) + (sample is not None)
    if dynamics == "ode" and given:
        raise ValueError("an ode step has no randomness: leave out noise and sample, or choose another dynamics")
    if dynamics != "ode" and given != 1:
        raise ValueError(f"{dynamics} needs exactly one of noise (to draw the next sample) and sample (to score it), got {given}")
    if not isinstance(noise_level, Tensor) and (noise_level < 0 or (dynamics == "cps" and noise_level > 1)):
        raise ValueError(
            f"noise_level {noise_level} is out of range for {dynamics}; set it to {'[0, 1]' if dynamics == 'cps' else '0 or more'}"
        )
    if not 0 <= sigma_max < 1:
        raise ValueError(f"sigma_max {sigma_max} must be the schedule's second entry, in [0, 1): pass float(sigmas[1])")
