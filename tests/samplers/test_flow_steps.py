"""Properties of every published rule for a step."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch.autograd import gradcheck

from lit_rl.samplers.flow import DYNAMICS, sde_step

NOISY = [d for d in DYNAMICS if d != "ode"]
SIGMAS = torch.tensor([1.0, 0.96, 0.7, 0.3, 0.01, 0.0], dtype=torch.float64)
SHAPE = (3, 4, 5)


def path(dtype=torch.float64, seed=0):
    """One row per step of the schedule: sigma 1 first, sigma_next 0 last."""
    g = torch.Generator().manual_seed(seed)
    x, v, z = (torch.randn(len(SIGMAS) - 1, *SHAPE, generator=g, dtype=torch.float64).to(dtype) for _ in range(3))
    return x, v, z, {"sigma": SIGMAS[:-1], "sigma_next": SIGMAS[1:], "sigma_max": SIGMAS[1].item()}


def test_flow_sde_by_hand():
    """sigma .5 -> .25, a = 1: g = sqrt(.5/.5) = 1, dt = -.25; x = 2, v = 1, z = 1.

    eps_hat = 2 + .5 = 2.5; mean = 2 - .25 + 1 * -.25 / (2 * .5) * 2.5 = 1.125; noise_std = .5; x' = 1.625;
    log-prob = -.5 - log .5 - log sqrt(2 pi) = -.5 + .693147 - .918939 = -.725791.
    """
    one = torch.ones(1, 1, dtype=torch.float64)
    half, quarter = torch.full((1,), 0.5, dtype=torch.float64), torch.full((1,), 0.25, dtype=torch.float64)
    step = sde_step(2 * one, one, sigma=half, sigma_next=quarter, dynamics="flow_sde", noise_level=1.0, sigma_max=0.9, noise=one)
    assert step.mean.item() == 1.125
    assert step.sample.item() == 1.625
    assert step.noise_std.item() == 0.5 and step.diffusion.item() == 1.0
    assert step.logprob.item() == pytest.approx(-0.5 + math.log(2) - 0.5 * math.log(2 * math.pi), abs=1e-12)


def test_cps_by_hand():
    """sigma .5 -> .25, a = 1/3: noise_std = .25 sin 30° = .125; x = 2, v = 1: x0 = 1.5, eps = 2.5; mean = .75 * 1.5 + .25 cos 30° * 2.5."""
    one = torch.ones(1, 1, dtype=torch.float64)
    half, quarter = torch.full((1,), 0.5, dtype=torch.float64), torch.full((1,), 0.25, dtype=torch.float64)
    step = sde_step(2 * one, one, sigma=half, sigma_next=quarter, dynamics="cps", noise_level=1 / 3, sigma_max=0.9, noise=one)
    assert step.mean.item() == pytest.approx(1.125 + 0.625 * math.sqrt(3) / 2, abs=1e-12)
    assert step.noise_std.item() == pytest.approx(0.125, abs=1e-12)
    assert step.logprob.item() == pytest.approx(-(0.125**2), abs=1e-12)


@pytest.mark.parametrize("dynamics", NOISY)
def test_level_zero_is_the_euler_step(dynamics):
    x, v, z, sigmas = path()
    euler = sde_step(x, v, dynamics="ode", noise_level=0.0, **sigmas)
    assert torch.equal(euler.sample, x + v * (sigmas["sigma_next"] - sigmas["sigma"]).view(-1, 1, 1, 1))
    for level in (0.0, torch.zeros(len(x))):
        step = sde_step(x, v, dynamics=dynamics, noise_level=level, noise=z, **sigmas)
        assert torch.equal(step.sample, euler.sample)
        assert torch.equal(step.logprob, torch.zeros_like(step.logprob)) and torch.equal(step.noise_std, euler.noise_std)


@pytest.mark.parametrize("dynamics", NOISY)
def test_no_nan_in_values_or_gradients(dynamics):
    """Level 0, sigma 1 and sigma_next 0 in one batch; the rows without noise still pass the Euler gradient through the mean."""
    x, v, z, sigmas = path()
    level = torch.tensor([0.7, 0.0, 0.7, 0.0, 0.7])
    for how in ({"noise": z}, {"sample": z}):
        v.grad = None
        v.requires_grad_()
        step = sde_step(x, v, dynamics=dynamics, noise_level=level, **how, **sigmas)
        (step.logprob.sum() + step.mean.sum()).backward()
        for value in (*step, v.grad):
            assert value.isfinite().all()
        dt = (sigmas["sigma_next"] - sigmas["sigma"]).view(-1, 1, 1, 1)
        still = level == 0
        torch.testing.assert_close(v.grad[still], dt[still].expand(-1, *SHAPE))
        assert (step.logprob[still] == 0).all() and not step.sample.requires_grad


@pytest.mark.parametrize("dynamics", NOISY)
def test_gradient_of_mean_and_logprob(dynamics):
    x, v, z, sigmas = path()
    level = torch.tensor([0.7, 0.0, 0.7, 0.7, 0.7])
    size = sde_step(x, v, dynamics=dynamics, noise_level=level, sample=z, **sigmas).logprob.abs() + 1  # from 1 to 1e5

    def outputs(v):
        step = sde_step(x, v, dynamics=dynamics, noise_level=level, sample=z, **sigmas)
        return step.mean, step.logprob / size

    assert gradcheck(outputs, v.requires_grad_())


@pytest.mark.parametrize("dynamics", NOISY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scoring_the_stored_sample_repeats_its_logprob_exactly(dynamics, dtype):
    """Rollout and training see the same rounded x', so the ratio of the first update is exactly 1."""
    x, v, z, sigmas = path(dtype)
    options = {"dynamics": dynamics, "noise_level": 0.7, **sigmas}
    drawn = sde_step(x, v, noise=z, dtype=dtype, **options)
    assert drawn.sample.dtype == dtype and drawn.logprob.dtype == torch.float32
    assert torch.equal(sde_step(x, v, sample=drawn.sample, **options).logprob, drawn.logprob)
    if dtype == torch.bfloat16:
        unrounded = sde_step(x, v, noise=z, **options)
        assert not torch.equal(unrounded.logprob, drawn.logprob)


@pytest.mark.parametrize("dynamics", NOISY)
def test_a_row_does_not_depend_on_its_batch(dynamics):
    x, v, z, sigmas = path()
    whole = sde_step(x, v, dynamics=dynamics, noise_level=0.7, noise=z, **sigmas)
    for i in range(len(x)):
        one = slice(i, i + 1)
        own = {"sigma": sigmas["sigma"][one], "sigma_next": sigmas["sigma_next"][one], "sigma_max": sigmas["sigma_max"]}
        alone = sde_step(x[one], v[one], dynamics=dynamics, noise_level=0.7, noise=z[one], **own)
        for a, b in zip(alone, whole, strict=True):
            torch.testing.assert_close(a, b[one])


@given(
    sigma=st.floats(0.05, 1.0),
    share=st.floats(0.0, 0.95),
    level=st.floats(0.0, 1.0),
    dynamics=st.sampled_from(["cps", "flow_sde", "dance_sde", "ode"]),
)
@settings(max_examples=60, deadline=None)
def test_what_a_step_does_to_the_noise_level(sigma, share, level, dynamics):
    """x' = (1 - sigma') x0 + k eps + noise_std z. cps and ode: k^2 + noise_std^2 is exactly sigma'^2. The SDEs have more, by O(dt^2)."""
    sigma_next = sigma * share
    x0, eps, z = (torch.full((1, 1), value, dtype=torch.float64) for value in (3.0, 1.0, 0.0))
    sigmas = {"sigma": torch.tensor([sigma], dtype=torch.float64), "sigma_next": torch.tensor([sigma_next], dtype=torch.float64)}
    noise = {} if dynamics == "ode" else {"noise": z}
    step = sde_step((1 - sigma) * x0 + sigma * eps, eps - x0, dynamics=dynamics, noise_level=level, sigma_max=0.97, **sigmas, **noise)
    of_eps = step.mean.item() - (1 - sigma_next) * 3.0
    variance = of_eps**2 + step.noise_std.item() ** 2
    if dynamics in ("cps", "ode"):
        assert variance == pytest.approx(sigma_next**2, abs=1e-9)
    else:
        # of_eps = sigma + dt + g^2 dt / (2 sigma)
        g2, dt = step.diffusion.item() ** 2, sigma_next - sigma
        assert variance - sigma_next**2 == pytest.approx(g2 * dt * dt / sigma + (g2 * dt / (2 * sigma)) ** 2, abs=1e-9, rel=1e-6)
        assert variance >= sigma_next**2 - 1e-12


def test_cps_keeps_the_marginal_and_flow_sde_overshoots():
    """If all data is the point c, v = (x - c) / sigma is exact. After any number of cps steps x ~ N((1 - sigma) c, sigma^2); of flow_sde
    steps, noisier than that: the grain in its images that cps was made to avoid."""
    g = torch.Generator().manual_seed(0)
    n, c, sigmas = 40_000, 2.0, torch.linspace(1, 0, 11, dtype=torch.float64)
    x = {d: torch.randn(n, 1, generator=g, dtype=torch.float64) for d in ("cps", "flow_sde")}
    for now, after in pairwise(sigmas[:-1]):
        rows = {"sigma": now.expand(n), "sigma_next": after.expand(n), "sigma_max": sigmas[1].item()}
        z = torch.randn(n, 1, generator=g, dtype=torch.float64)
        for d in x:
            x[d] = sde_step(x[d], (x[d] - c) / now, dynamics=d, noise_level=0.7, noise=z, **rows).sample
        assert x["cps"].mean().item() == pytest.approx((1 - after.item()) * c, abs=0.02)
        assert x["cps"].std().item() == pytest.approx(after.item(), rel=0.02)
    assert x["flow_sde"].std().item() > 1.05 * sigmas[-2].item()


def test_logprob_is_the_normal_density():
    x, v, z, sigmas = path()
    step = sde_step(x, v, dynamics="flow_sde", noise_level=0.7, noise=z, **sigmas)
    normal = torch.distributions.Normal(step.mean, step.noise_std.view(-1, 1, 1, 1))
    torch.testing.assert_close(step.logprob, normal.log_prob(step.sample).flatten(1).mean(1))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"dynamics": "ddim"}, "ddim"),
        ({"noise": None}, "exactly one of noise"),
        ({"sample": torch.zeros(5, *SHAPE)}, "exactly one of noise"),
        ({"dynamics": "ode"}, "leave out noise"),
        ({"dynamics": "cps", "noise_level": 1.5}, r"noise_level 1.5 .* set it to \[0, 1\]"),
        ({"noise_level": -0.1}, "set it to 0 or more"),
        ({"sigma_max": 1.0}, r"float\(sigmas\[1\]\)"),
    ],
)
def test_what_cannot_be_is_said(change, message):
    x, v, z, sigmas = path(torch.float32)
    options = {"dynamics": "flow_sde", "noise_level": 0.7, "noise": z, **sigmas} | change
    with pytest.raises((ValueError, TypeCheckError), match=message):  # the latter where shapes and literals are checked first
        sde_step(x, v, **options)
