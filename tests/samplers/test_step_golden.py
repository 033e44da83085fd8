"""Steps of every public trainer, fed through one function."""

import pytest
import torch
from golden_numbers import LOGPROB_F32, assert_close, cases, load

from lit_rl.samplers.flow import sde_step

pytestmark = pytest.mark.golden


def compare(step, case: dict, i: int, *, next_key="x_next", logprob_key="log_prob", mean_key="mean", what="") -> None:
    assert_close(step.mean, case[mean_key][i], what=f"{what} mean")
    if next_key in case:
        assert_close(step.sample, case[next_key][i], what=f"{what} next sample")
    assert_close(step.logprob, case[logprob_key][i], f32=LOGPROB_F32, what=f"{what} log-prob")


def rows(value, like):
    """A scalar per case, or one per row already."""
    return value.expand(len(like)) if value.ndim == 0 else value


def both_ways(case: dict, i: int, *, what: str, **options):
    """Draw with the authors' noise, score the authors' other sample; returns the drawn step."""
    x, v = case["x"][i], case["v"][i]
    options |= {"sigma": rows(case["sigma"][i], x), "sigma_next": rows(case["sigma_next"][i], x)}
    drawn = None
    if "z" in case:
        drawn = sde_step(x, v, noise=case["z"][i], **options)
        compare(drawn, case, i, what=f"{what} drawn")
    if "x_given" in case:
        given = sde_step(x, v, sample=case["x_given"][i], **options)
        compare(given, case, i, next_key="", logprob_key="log_prob_given", what=f"{what} given")
    return drawn


@pytest.mark.parametrize("tag", ["f32", "f64"])
def test_flow_grpo_steps(golden_dir, tag):
    data = load(golden_dir / "diffusion", f"sde_step_flow_grpo_{tag}")
    for match, case in cases(data, rf"(sde|cps)_{tag}"):
        kind = match[1]
        dynamics = {"sde": "flow_sde", "cps": "cps"}[kind]
        for i in range(len(case["x"])):
            step = both_ways(
                case,
                i,
                what=f"{kind} case {i}",
                dynamics=dynamics,
                noise_level=float(data[f"noise_level_{kind}"]),
                sigma_max=float(data[f"sigmas_{tag}"][1]),
            )
            full = case["std_dev_t"][i] if kind == "cps" else case["std_dev_t"][i] * case["sqrt_neg_dt"][i]
            assert_close(step.noise_std, full, what="noise_std")
            assert_close(step.diffusion * case["sqrt_neg_dt"][i], full, what="diffusion")


@pytest.mark.parametrize("tag", ["f32", "f64"])
def test_video_steps(golden_dir, tag):
    data = load(golden_dir / "diffusion", f"sde_step_video_{tag}")
    shared = {name: value for _, case in cases(data, f"wan_{tag}") for name, value in case.items()}
    level, sigma_max = float(data["genrl_noise_level"]), float(data[f"sigmas_{tag}"][1])
    variants = {
        "wan": {"dynamics": "wan_sde", "noise_level": 1.0},
        "genrl_sde": {"dynamics": "flow_sde", "noise_level": level},
        "genrl_cps": {"dynamics": "cps", "noise_level": level},
    }
    for match, own in cases(data, f"(wan|genrl_sde|genrl_cps)_{tag}"):
        case = shared | own
        for i in range(len(case["x"])):
            step = both_ways(case, i, what=f"{match[1]} case {i}", sigma_max=sigma_max, **variants[match[1]])
            published = step.noise_std if match[1] == "genrl_cps" else step.diffusion
            assert_close(published, case["std_dev_t"][i], what="std")
            if "x_next_deterministic" in case:
                sigmas = {"sigma": case["sigma"][i], "sigma_next": case["sigma_next"][i], "sigma_max": sigma_max}
                euler = sde_step(case["x"][i], case["v"][i], dynamics="ode", noise_level=0.0, **sigmas)
                assert_close(euler.sample, case["x_next_deterministic"][i], what="deterministic")


@pytest.mark.parametrize("tag", ["f32", "f64"])
def test_dance_and_mix_steps(golden_dir, tag):
    data = load(golden_dir / "diffusion", "sde_step_dance_mixgrpo")
    (_, dance), (_, mix) = *cases(data, f"dance_{tag}"), *cases(data, f"mix_flow_{tag}")
    options = {"noise_level": float(data["eta"]), "sigma_max": float(data[f"sigmas_{tag}"][1])}
    dance["mean"] = dance["mean_sde"]
    for i in range(len(dance["x"])):
        both_ways(dance, i, what=f"dance case {i}", dynamics="dance_sde", **options)
        step = both_ways(mix | {k: dance[k] for k in ("x", "v", "sigma", "sigma_next")}, i, what=f"mix {i}", dynamics="flow_sde", **options)
        assert_close(step.noise_std, rows(mix["std_sqrt_dt"][i], step.noise_std), what="noise_std")

        x, v = dance["x"][i], dance["v"][i]
        sigmas = {"sigma": rows(dance["sigma"][i], x), "sigma_next": rows(dance["sigma_next"][i], x)}
        still = sde_step(x, v, dynamics="ode", **sigmas, **options)
        assert_close(still.sample, dance["mean_ode"][i], what="ode")
        assert_close(still.sample, mix["x_next_deterministic"][i], what="mix deterministic")


def test_mix_dance_logprob_lacks_the_constants(golden_dir):
    """MixGRPO's own copy of DanceGRPO's step drops -log std - log sqrt(2 pi): equal up to one constant per step, so equal ratios."""
    data = load(golden_dir / "diffusion", "sde_step_dance_mixgrpo")
    (_, dance), (_, dropped) = *cases(data, "dance_f32"), *cases(data, "mix_dance_f32")
    std = float(data["eta"]) * (dance["sigma"] - dance["sigma_next"]).double().sqrt()
    constants = std.log() + 0.5 * torch.log(torch.tensor(2 * torch.pi, dtype=torch.float64))
    for i, theirs in enumerate(dropped["log_prob_given_constants_dropped"]):
        x = dance["x"][i]
        step = sde_step(
            x,
            dance["v"][i],
            sigma=rows(dance["sigma"][i], x),
            sigma_next=rows(dance["sigma_next"][i], x),
            dynamics="dance_sde",
            noise_level=float(data["eta"]),
            sigma_max=float(data["sigmas_f32"][1]),
            sample=dance["x_given"][i],
        )
        assert_close(step.logprob + constants[i], theirs.double(), f64=LOGPROB_F32, what=f"case {i}")


@pytest.mark.parametrize("tag", ["f32", "f64"])
def test_deepgen_steps(golden_dir, tag):
    """DeepGen-RL adds 1e-8 to the variance, inside the logarithm and to dance's sigma^2; with these put in, the numbers are equal."""
    data = load(golden_dir / "diffusion", "sde_step_deepgen")
    names = {"flowgrpo_sde": "flow_sde", "cps_sde": "cps", "dance_sde": "dance_sde"}
    for match, case in cases(data, rf"(\w+_sde)_{tag}"):
        dynamics = names[match[1]]
        for i in range(len(case["x"])):
            x, v, sigma, sigma_next = (case[k][i] for k in ("x", "v", "sigma", "sigma_next"))
            sigma, sigma_next = rows(sigma, x), rows(sigma_next, x)
            common = {
                "sigma": sigma,
                "sigma_next": sigma_next,
                "sigma_max": float(data[f"sigmas_{tag}"][1]),
                "noise_level": float(data["eta"]),
            }
            step = sde_step(x, v, dynamics=dynamics, sample=case["x_given"][i], **common)
            mean, logprob = step.mean, step.logprob
            if dynamics == "dance_sde":
                euler = sde_step(x, v, dynamics="ode", **common).mean
                mean = euler + (mean - euler) * (sigma**2 / (sigma**2 + 1e-8)).view(-1, 1, 1, 1)
            if dynamics != "cps":
                square = (case["x_given"][i] - mean).pow(2).flatten(1).mean(1)
                std = step.noise_std
                logprob = (
                    -square / (2 * (std**2 + 1e-8)) - (std + 1e-8).log() - 0.5 * torch.log(torch.tensor(2 * torch.pi, dtype=std.dtype))
                )
            assert_close(mean, case["mean"][i], what=f"{match[0]} {i} mean")
            assert_close(logprob, case["log_prob_given"][i], f32=LOGPROB_F32, what=f"{match[0]} {i} log-prob")


def test_flow_factory_steps(golden_dir):
    """Its bfloat16 latents are rounded before their log-prob, as ours."""
    data = load(golden_dir / "diffusion", "sde_step_flow_factory")
    names = {"Flow-SDE": "flow_sde", "Dance-SDE": "dance_sde", "CPS": "cps", "ODE": "ode"}
    for match, case in cases(data, r"([\w-]+)_(f32|bf16)"):
        dynamics, dtype = names[match[1]], {"f32": torch.float32, "bf16": torch.bfloat16}[match[2]]
        for i in range(len(case["x"])):
            x, v = case["x"][i].to(dtype), case["v"][i].to(dtype)
            options = {
                "sigma": case["timestep"][i] / 1000,
                "sigma_next": case["timestep_next"][i] / 1000,
                "dynamics": dynamics,
                "noise_level": float(data["noise_level"]),
                "sigma_max": float(data["sigmas"][1]),
            }
            noise = {} if dynamics == "ode" else {"noise": case["z"][i]}
            step = sde_step(x, v, dtype=dtype, **noise, **options)
            what = f"{match[0]} {i}"
            if dynamics == "ode":  # not rounded upstream
                assert_close(step.mean, case["x_next"][i], what=what)
            else:
                assert step.sample.dtype == dtype
                # One unit in the last place of bfloat16 where the two float32 results straddle a rounding boundary.
                assert_close(step.sample.float(), case["x_next"][i], f32=2e-5 if dtype == torch.float32 else 8e-3, what=what)
                given = sde_step(x, v, sample=case["x_given"][i].to(dtype), **options)
                assert_close(given.logprob, case["log_prob_given"][i], f32=LOGPROB_F32, what=what)
                rescored = sde_step(x, v, sample=case["x_next"][i].to(dtype), **options)
                assert_close(rescored.logprob, case["log_prob"][i], f32=LOGPROB_F32, what=what)
            assert_close(step.mean, case["mean"][i], what=what)
            assert_close(step.noise_std if dynamics == "cps" else step.diffusion, case["std_dev_t"][i], what=what)
