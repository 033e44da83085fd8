"""Solvers: exact where they must be, of the order they claim, and step for step the authors'."""

import math

import pytest
import torch
from golden_numbers import assert_close, load
from schedule_formulas import sd3_sigmas

from lit_rl.samplers.schedules import shifted_sigmas
from lit_rl.samplers.solvers import ddim_step, dpm_step, solve

SOLVERS = ("ode", "ddim", "dpm1", "dpm2")


def path(velocity, x, sigmas, solver, **options):
    return list(solve(velocity, x, sigmas=sigmas, solver=solver, **options))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_straight_path_is_exact(solver, steps):
    """v = eps - x0 everywhere: after any number of steps x is x0, and before that (1 - sigma) x0 + sigma eps."""
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 3, 2, 4, generator=g, dtype=torch.float64)
    sigmas = sd3_sigmas(steps, shift=3.0)
    found = path(lambda x, sigma: eps - x0, eps, sigmas, solver)
    assert len(found) == steps
    for x, sigma in zip(found, sigmas[1:]):
        torch.testing.assert_close(x, (1 - sigma) * x0 + sigma * eps)


@pytest.mark.parametrize("solver", ["ddim", "dpm1"])
def test_first_order_solvers_are_euler(solver):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, 4, generator=g, dtype=torch.float64)
    found, euler = (path(lambda x, s: (x * (1 + s)).sin(), x, shifted_sigmas(8, shift=2.0), s) for s in (solver, "ode"))
    for a, b in zip(found, euler):
        torch.testing.assert_close(a, b)


def gaussian_error(solver, steps):
    """Distance from the true end of a path to data N(1, 0.3^2): x0 = 1 + 0.3 x_1."""
    start = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]

    def velocity(x, sigma):
        a, b, s = 1 - sigma, sigma, 0.3
        variance = (a * s) ** 2 + b**2
        clean = 1 + a * s**2 / variance * (x - a)
        return (x - clean) / max(sigma, 1e-12)

    return float((path(velocity, start, shifted_sigmas(steps, shift=1.0), solver)[-1] - (1 + 0.3 * start)).abs().max())


def test_orders():
    """Twice the steps: half the error for Euler, less for the second order, though its end steps are of first; it starts closer."""
    first, second = ([gaussian_error(solver, n) for n in (20, 40, 80)] for solver in ("ode", "dpm2"))
    assert first[1] / first[2] == pytest.approx(2, rel=0.15)
    assert second[1] / second[2] > 2.4
    assert second[0] < first[0] / 3


def test_second_order_step_by_hand():
    """sigma = .5, .4 after .6: lambda = 0, log 1.5, before -log 1.5; h ratio 1, so D = 1.5 x0_hat - .5 previous = 1.5 * 2 - .5 = 2.5;
    e^-h = 2/3: x' = .8 * 3 + .6 / 3 * 2.5 = 2.9."""
    x, clean, before = (torch.tensor([[v]], dtype=torch.float64) for v in (3.0, 2.0, 1.0))
    assert dpm_step(x, clean, sigma=0.5, sigma_next=0.4, previous=(before, 0.6)).item() == pytest.approx(2.9)
    assert dpm_step(x, clean, sigma=0.5, sigma_next=0.4).item() == pytest.approx(0.8 * 3 + 0.2 * 2)


def test_fresh_noise_of_ddim_by_hand():
    """sigma = .5 -> .4, eta = 1: ratio = .4 .5 / (.5 .6) = 2/3, rho = .4 sqrt(1 - 4/9); the noise in x' stays .4 in all."""
    x, clean, z = (torch.tensor([[v]], dtype=torch.float64) for v in (3.0, 2.0, -1.0))
    rho = 0.4 * math.sqrt(5) / 3
    expected = 0.6 * 2 + math.sqrt(0.16 - rho**2) * (3 - 0.5 * 2) / 0.5 - rho
    assert ddim_step(x, clean, sigma=0.5, sigma_next=0.4, eta=1.0, noise=z).item() == pytest.approx(expected)


def test_noise_and_eta_go_together():
    x = torch.zeros(1, 2)
    for options in (dict(solver="dpm2", eta=0.5, noise=lambda i: x), dict(solver="ddim", eta=0.5), dict(solver="ddim", noise=lambda i: x)):
        with pytest.raises(ValueError, match="eta"):
            path(lambda x, s: x, x, shifted_sigmas(2, shift=1.0), **options)


@pytest.mark.golden
def test_published_paths(golden_dir):
    """DiffusionNFT's run_sampling; its "flow" with eta 0 is Euler."""
    data = load(golden_dir / "diffusion", "solvers_nft")
    seen = set()
    for key in (k for k in data if k.endswith("_latents")):
        name, eta = key.removesuffix("_latents").split("_eta")
        if name == "dance" or (name == "flow" and float(eta)):
            continue  # stochastic dynamics, in lit_rl.samplers.flow
        solver = "ode" if name == "flow" else name
        noise = (lambda i: data["noise_stream"][i]) if float(eta) else None
        found = path(
            lambda x, s: data["A"] * x * (0.5 + s) + data["b"], data["x_init"], data["sigmas"], solver, eta=float(eta), noise=noise
        )
        assert_close(torch.stack([data["x_init"], *found]), data[key], what=key)
        seen.add(solver)
    assert seen == set(SOLVERS)
