"""Sigma schedules: the published numbers, and diffusers itself."""

import math
from itertools import pairwise

import pytest
import torch
from golden_numbers import assert_close, cases, load
from schedule_formulas import flux_sigmas, sd3_sigmas

from lit_rl.samplers.flow import sde_step
from lit_rl.samplers.schedules import flux_mu, linear_sigmas, shift_sigmas, shifted_sigmas


def test_shift_by_hand():
    """shift 3: u = .5 -> 1.5 / 2 = .75; u = .25 -> .75 / 1.5 = .5; the ends stay."""
    u = torch.tensor([1.0, 0.5, 0.25, 0.0], dtype=torch.float64)
    assert shift_sigmas(u, shift=3.0).tolist() == [1.0, 0.75, 0.5, 0.0]
    assert torch.equal(shift_sigmas(u, shift=1.0), u)


@pytest.mark.parametrize("n", [1, 2, 10, 28])
def test_every_schedule_falls_from_one_to_zero(n):
    for sigmas in (sd3_sigmas(n, shift=3.0), flux_sigmas(n, image_tokens=1024), shifted_sigmas(n, shift=3.0), linear_sigmas(n)):
        assert sigmas.shape == (n + 1,) and sigmas.dtype == torch.float64
        assert sigmas[0] == 1 and sigmas[-1] == 0
        assert (sigmas.diff() < 0).all()


@pytest.mark.parametrize("n", [1, 10, 28, 50])
def test_diffusers_schedulers_sample_with_these(n):
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    for shift in (1.0, 3.0):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(n)
        assert_close(sd3_sigmas(n, shift=shift).float(), scheduler.sigmas, f32=1e-6)
    for tokens in (256, 1024, 4096):
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / n, n).tolist(), mu=calculate_shift(tokens))
        assert_close(flux_sigmas(n, image_tokens=tokens).float(), scheduler.sigmas, f32=1e-6)


def test_no_steps_is_refused():
    with pytest.raises(ValueError, match="num_steps=0"):
        linear_sigmas(0)


@pytest.mark.golden
def test_published_schedules(golden_dir):
    data = load(golden_dir / "diffusion", "sigma_schedules")
    tokens = {m[1]: int(case["seq_len"]) for m, case in cases(data, r"flux_(\d+)")}
    for match, case in cases(data, r"flux_(\d+)"):
        assert flux_mu(tokens[match[1]]) == pytest.approx(float(case["mu"]), rel=1e-12)
    make = {
        "sd3": lambda n, shift: sd3_sigmas(n, shift=shift),
        "flowfactory_sd3": lambda n, shift: shifted_sigmas(n, shift=shift),
        "dance": lambda n, shift: shifted_sigmas(n, shift=shift),
    }
    for match, case in cases(data, r"(sd3|flowfactory_sd3|dance)_shift([\d.]+)_n(\d+)"):
        sigmas = make[match[1]](int(match[3]), float(match[2]))
        assert_close(sigmas, case["sigmas"], what=match[0])
        if "timesteps" in case:
            assert_close(1000 * sigmas[:-1], case["timesteps"], what=match[0])
    for match, case in cases(data, r"flux_(\d+)_n(\d+)"):
        sigmas = flux_sigmas(int(match[2]), image_tokens=tokens[match[1]])
        assert_close(sigmas, case["sigmas"], what=match[0])
        assert_close(1000 * sigmas[:-1], case["timesteps"], what=match[0])


@pytest.mark.golden
def test_training_sigmas(golden_dir):
    """The sigmas a diffusers scheduler is born with: shift(k / 1000), k = 1000 ... 1."""
    data = load(golden_dir / "diffusion", "sigma_schedules")
    found = [key for key in data if key.endswith("_init_sigmas")]
    assert found
    for key in found:
        shift, stem = float(key.split("shift")[1].split("_")[0]), key.removesuffix("_init_sigmas")
        expected = data[key]
        k = torch.arange(len(expected), 0, -1, dtype=torch.float64) / len(expected)
        sigmas = shift_sigmas(k, shift=shift)
        assert_close(sigmas, expected, what=key)
        assert math.isclose(sigmas[-1], float(data[f"{stem}_sigma_min"]), rel_tol=1e-5)
        assert math.isclose(sigmas[0], float(data[f"{stem}_sigma_max"]), rel_tol=1e-5)


@pytest.mark.golden
def test_euler_trajectory(golden_dir):
    """diffusers' own `step` along one of the schedules of the file, from the first point of the trajectory."""
    data = load(golden_dir / "diffusion", "sigma_schedules")
    v, trajectory = data["euler_v"], data["euler_traj"]
    fits = [c["sigmas"] for _, c in cases(data, r"sd3_shift[\d.]+_n\d+") if len(c["sigmas"]) == len(trajectory)]
    errors = []
    for sigmas in fits:
        x, path = trajectory[0], [trajectory[0]]
        for now, after in pairwise(sigmas):
            x = sde_step(
                x, v, sigma=now.expand(len(x)), sigma_next=after.expand(len(x)), dynamics="ode", noise_level=0.0, sigma_max=float(sigmas[1])
            ).sample
            path.append(x)
        errors.append((torch.stack(path) - trajectory).abs().max().item())
    assert min(errors) < 2e-5, errors
