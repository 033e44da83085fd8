"""From noise to data without an action to learn from: solvers of dx / dsigma = v, for rollouts and evaluation.

Notation as in `lit_rl.samplers.flow`. Coefficients are computed in float64 from the schedule, latents keep their own precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from lit_rl.errors import ConfigError

Solver = Literal["ode", "ddim", "dpm1", "dpm2"]
"""ode: Euler. ddim: the same at eta 0. dpm1: the same up to rounding. dpm2: multistep DPM-Solver++ of second order (arXiv 2211.01095)."""


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Solver of rollouts that need no action to learn from.

    Args:
        solver: See `lit_rl.samplers.solvers`.
        eta: Share of fresh noise in each step of solver ddim.
    """

    solver: Solver = "dpm2"
    eta: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1 or (self.eta and self.solver != "ddim"):
            raise ConfigError(
                f"model.sampler.eta={self.eta} is the noise of model.sampler.solver=ddim, in [0, 1]; for solver {self.solver} set it to 0"
            )


def solve(
    velocity: Callable[[Tensor, float], Tensor],
    x: Float[Tensor, "B *D"],
    *,
    sigmas: Float[Tensor, "n"],
    solver: Solver,
    eta: float = 0.0,
    noise: Callable[[int], Tensor] | None = None,
) -> Iterator[Tensor]:
    """x at sigmas[1], ..., sigmas[N], one `velocity(x, sigma)` for each: the last one is clean.

    Args:
        sigmas: N + 1 of them, falling; the first one is 1 and the last one 0 for a whole path.
        eta: Share of fresh noise in each step of ddim, in [0, 1]; 0 for all other solvers.
        noise: Standard normal "B *D" for step i; needed where eta is above 0.
    """
    if eta and solver != "ddim":
        raise ValueError(f"eta {eta} is the noise of solver ddim; {solver} draws none: set eta to 0")
    if bool(eta) != (noise is not None):
        raise ValueError(f"eta {eta} {'needs' if eta else 'takes no'} noise")
    schedule = sigmas.double().tolist()
    last, previous = len(schedule) - 2, None
    for i, (sigma, sigma_next) in enumerate(pairwise(schedule)):
        v = velocity(x, sigma)
        clean = x - sigma * v
        if solver == "ode":
            x = x + (sigma_next - sigma) * v
        elif solver == "ddim" or i in (0, last):  # log(1 - sigma) and log(sigma) are infinite at the ends
            z = noise(i).to(x) if noise else None
            x = ddim_step(x, clean, sigma=sigma, sigma_next=sigma_next, eta=eta, noise=z)
        else:
            x = dpm_step(x, clean, sigma=sigma, sigma_next=sigma_next, previous=previous if solver == "dpm2" else None)
        previous = (clean, sigma)
        yield x


def ddim_step(
    x: Float[Tensor, "B *D"],
    clean: Float[Tensor, "B *D"],
    *,
    sigma: float,
    sigma_next: float,
    eta: float = 0.0,
    noise: Float[Tensor, "B *D"] | None = None,
) -> Float[Tensor, "B *D"]:
    """x' = (1 - sigma') x0_hat + sqrt(sigma'^2 - rho^2) eps_hat + rho z: DDIM (arXiv 2010.02502, eq. 12) on a straight path.

    rho = eta sigma' sqrt(1 - sigma'^2 (1 - sigma)^2 / (sigma^2 (1 - sigma')^2)). clean: x0_hat. sigma in (0, 1], sigma' in [0, sigma).
    """
    ratio = sigma_next * (1 - sigma) / (sigma * (1 - sigma_next))
    rho = eta * sigma_next * math.sqrt(max(0.0, 1 - ratio**2))
    x_next = (1 - sigma_next) * clean + math.sqrt(sigma_next**2 - rho**2) * ((x - (1 - sigma) * clean) / sigma)
    return x_next if noise is None else x_next + rho * noise


def dpm_step(
    x: Float[Tensor, "B *D"],
    clean: Float[Tensor, "B *D"],
    *,
    sigma: float,
    sigma_next: float,
    previous: tuple[Float[Tensor, "B *D"], float] | None = None,
) -> Float[Tensor, "B *D"]:
    """x' = sigma'/sigma x - (1 - sigma') (e^-h - 1) (D0 + D1 / 2): DPM-Solver++, midpoint (arXiv 2211.01095, algorithm 2).

    lambda = log((1 - sigma) / sigma), h = lambda' - lambda, D0 = x0_hat, D1 = (x0_hat - previous x0_hat) h / (lambda - previous lambda).
    previous: (x0_hat, sigma) of the step before; without it, or where that sigma is 1 (lambda infinite), the step is of first order.
    sigma and sigma' in (0, 1).
    """
    here = _log_ratio(sigma)
    h = _log_ratio(sigma_next) - here
    target = clean
    if previous is not None and previous[1] < 1:
        before, sigma_before = previous
        target = clean + (clean - before) * (0.5 * h / (here - _log_ratio(sigma_before)))
    return (sigma_next / sigma) * x - ((1 - sigma_next) * math.expm1(-h)) * target


def _log_ratio(sigma: float) -> float:
    """Half the log of the signal-to-noise ratio."""
    return math.log((1 - sigma) / sigma)
