"""The forward-process losses: worked by hand, as gradients in closed form, and against the authors' numbers."""

import json
import re

import numpy as np
import pytest
import torch
from golden_numbers import assert_close, cases, f64, load
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import grad

from lit_rl.losses.flow import gaussian_kl
from lit_rl.losses.nft import matching_logprob, nft_loss, optimality
from lit_rl.losses.policy_gradient import clipped_surrogate

MODES = ("normal", "positive_only", "negative_only", "one_only", "binary")


@pytest.mark.parametrize(
    "mode, expected",
    [
        ("normal", (0.0, 0.3, 0.5, 0.6, 1.0)),
        ("positive_only", (0.5, 0.5, 0.5, 0.6, 1.0)),
        ("negative_only", (0.0, 0.3, 0.5, 0.5, 0.5)),
        ("one_only", (0.5, 0.5, 0.5, 0.6, 0.6)),
        ("binary", (0.4, 0.4, 0.5, 0.6, 0.6)),
    ],
)
def test_optimality_by_hand(mode, expected):
    """A = -9, -2, 0, 1, 7 over 2 x 5, plus 1/2, after the clamp to [-5, 5] and the mode."""
    torch.testing.assert_close(optimality(f64(-9, -2, 0, 1, 7), clip=5.0, mode=mode), f64(*expected))


def test_loss_by_hand():
    """x0 = 0, noise = 2, sigma = 1/2, so x = 1 and v = 2 would be right. new = 3, old = 1, beta = 1/2:
    v+ = 2, e+ = 1 - 1 - 0 = 0, l+ = 0; v- = 1.5 - 1.5 = 0, e- = 1, l- = 1 / 1; r = 3/4: 5 (0 + 1/4) / (1/2) = 2.5."""
    loss = nft_loss(f64([3.0]), f64([1.0]), x=f64([1.0]), x0=f64([0.0]), sigma=f64(0.5), r=f64(0.75), beta=0.5, scale=5.0)
    assert (loss.policy.item(), loss.positive.item(), loss.negative.item()) == pytest.approx((2.5, 0.0, 1.0))


@given(st.integers(0, 10_000), st.sampled_from([0.1, 0.5, 1.0, 2.0]))
@settings(max_examples=30, deadline=None)
def test_gradient_at_the_old_policy_does_not_depend_on_beta(seed, beta):
    """dL/dnew = scale (2r - 1) 2 (-sigma) e / (w D) at new = old; zero where the advantage is."""
    g = torch.Generator().manual_seed(seed)
    new, x, x0 = torch.randn(3, 6, 2, 3, generator=g, dtype=torch.float64).unbind()
    sigma, advantages = torch.rand(6, generator=g, dtype=torch.float64), 5 * torch.randn(6, generator=g, dtype=torch.float64)
    advantages[0] = 0
    new.requires_grad_()
    r = optimality(advantages, clip=5.0)
    found = grad(nft_loss(new, new, x=x, x0=x0, sigma=sigma, r=r, beta=beta, scale=5.0).policy.sum(), new)[0]
    e = (x - sigma[:, None, None] * new - x0).detach()
    w = e.abs().mean((1, 2))
    torch.testing.assert_close(found, (-10 * (2 * r - 1) * sigma / (w * 6))[:, None, None] * e)
    assert found[0].abs().max() < 1e-15


def test_bfloat16_is_computed_in_float32():
    g = torch.Generator().manual_seed(0)
    new, old, x, x0 = torch.randn(4, 3, 8, generator=g).bfloat16().unbind()
    sigma, r = torch.rand(3, generator=g), torch.rand(3, generator=g)
    loss = nft_loss(new, old, x=x, x0=x0, sigma=sigma, r=r, beta=1.0, scale=5.0)
    same = nft_loss(new.float(), old.float(), x=x.float(), x0=x0.float(), sigma=sigma, r=r, beta=1.0, scale=5.0)
    assert loss.policy.dtype == torch.float32 and torch.equal(loss.policy, same.policy)


def test_matching_logprob_by_hand():
    """v is off by 2 in one of two elements: m = 2; sigma = 1/2. huber: (sqrt 2 - 1e-5) / 2; ghuber, p = 1/4: (2^(1/4) - 1e-2.5) 2."""
    x0, noise, sigma = f64([0.0, 0.0]), f64([1.0, 1.0]), f64(0.5)
    expected = {"uniform": -2, "t": -1, "t2": -0.5, "huber": -(2**0.5 - 1e-5) / 2, "ghuber": -(2**0.25 - 10**-2.5) * 2}
    for weight, value in expected.items():
        assert matching_logprob(f64([3.0, 1.0]), x0, noise, sigma=sigma, weight=weight).item() == pytest.approx(value)


def test_beta_of_zero_is_refused():
    row, one = f64([1.0]), f64(1.0)
    with pytest.raises(ValueError, match="beta 0.0 must be above 0"):
        nft_loss(row, row, x=row, x0=row, sigma=one, r=one, beta=0.0, scale=5.0)


def weighted(values, valid):
    """Mean over the valid rows; 0 where there are none."""
    return (values * valid).sum() / valid.sum().clamp(min=1)


@pytest.mark.golden
@pytest.mark.parametrize("tag", ["f32", "f64"])
def test_published_losses_and_gradients(golden_dir, tag):
    """DiffusionNFT's and Edit-R1's blocks; the latter leaves rows out of the mean."""
    data = load(golden_dir / "diffusion", "nft_loss")
    _, shared = next(cases(data, tag))
    sigma, clip = shared["timesteps"] / 1000, float(data["adv_clip_max"])
    everyone = torch.ones_like(data["valid_mask"])
    masks = {"nft": everyone, "edit": data["valid_mask"], "edit_allbanned": ~everyone}
    for match, case in cases(data, rf"{tag}__(nft|edit|edit_allbanned)_beta([\d.]+)_(\w+)"):
        new = shared["new"].clone().requires_grad_()
        r = optimality(shared["advantages"][:, 1], clip=clip, mode="normal" if match[3] == "all" else match[3])
        loss = nft_loss(new, shared["old"], x=shared["xt"], x0=shared["x0"], sigma=sigma, r=r, beta=float(match[2]), scale=clip)
        total = weighted(loss.policy + float(data["kl_beta"]) * gaussian_kl(new, shared["ref"], kind="v"), masks[match[1]].to(r.dtype))
        what = match[0]
        assert_close(r, case["r"], what=f"{what} r")
        assert_close(loss.positive, case["positive_loss"], what=f"{what} positive")
        assert_close(loss.negative, case["negative_loss"], what=f"{what} negative")
        assert_close(loss.policy / clip * masks[match[1]], case["ori_policy_loss"], what=f"{what} policy")
        assert_close(total, case["total_loss"], what=f"{what} total")
        assert_close(grad(total, new)[0], case["grad_new"], what=f"{what} gradient")


@pytest.mark.golden
@pytest.mark.parametrize("tag", ["f32", "f64"])
def test_flow_factorys_losses_and_gradients(golden_dir, tag):
    data = load(golden_dir / "diffusion", "nft_loss")
    _, shared = next(cases(data, tag))
    clip = float(data["adv_clip_max"])
    for match, case in cases(data, rf"{tag}__ff_beta([\d.]+)"):
        new = shared["new"].clone().requires_grad_()
        r = optimality(shared["advantages"][:, 1], clip=clip)
        loss = nft_loss(
            new, shared["old"], x=shared["xt"], x0=shared["x0"], sigma=shared["timesteps"] / 1000, r=r, beta=float(match[1]), scale=clip
        )
        total = (loss.policy + float(data["kl_beta"]) * gaussian_kl(new, shared["ref"], kind="v")).mean()
        assert_close(loss.policy.mean(), case["policy_loss"], what=f"{match[0]} policy")
        assert_close(total, case["loss"], what=f"{match[0]} loss")
        assert_close(grad(total, new)[0], case["grad_new"], what=f"{match[0]} gradient")


@pytest.mark.golden
def test_the_flux_fill_trainers_losses_and_gradients(golden_dir):
    """It gives the loss the wrong tensors, but the loss itself is DiffusionNFT's, in all modes, with a mask of the rows too."""
    folder = golden_dir / "calligrapher"
    with np.load(folder / "rl.npz", allow_pickle=False) as data:
        arrays = {key: torch.from_numpy(data[key]) for key in data.files}
    described = [case for case in json.loads((folder / "rl.json").read_text())["cases"] if re.fullmatch(r"nft\d+", case.get("key", ""))]
    assert {case["mode"] for case in described} == set(MODES)
    for case in described:
        a = {name.rpartition("/")[2]: value for name, value in arrays.items() if name.startswith(case["key"] + "/")}
        new, clip = a["forward"].clone().requires_grad_(), case["adv_clip_max"]
        r = optimality(a["adv"], clip=clip, mode=case["mode"])
        loss = nft_loss(new, a["old"], x=a["xt"], x0=a["x0"], sigma=a["t"], r=r, beta=case["beta"], scale=clip)
        valid = a.get("valid_mask", torch.ones_like(r))
        total = weighted(loss.policy + case["kl_beta"] * gaussian_kl(new, a["ref"], kind="v"), valid)
        assert_close(total, a["loss"], what=f"{case['key']} loss")
        assert_close(grad(total, new)[0], a["grad"], what=f"{case['key']} gradient")


@pytest.mark.golden
def test_published_matching_logprobs_and_gradients(golden_dir):
    data = load(golden_dir / "diffusion", "other_losses")
    names = {"Uniform": "uniform", "t": "t", "tpow2": "t2", "huber": "huber", "ghuber": "ghuber"}
    sigma, seen = data["timesteps"] / 1000, {}
    for match, case in cases(data, r"awm_(Uniform|t|tpow2|huber|ghuber)(?:_p([\d.]+))?"):
        options = dict(sigma=sigma, weight=names[match[1]], power=float(match[2] or 0.25))
        new = data["new"].clone().requires_grad_()
        logprob = matching_logprob(new, data["x0"], data["noise"], **options)
        assert_close(logprob, case["log_prob"], what=f"{match[0]} log-prob")
        assert_close(matching_logprob(data["old"], data["x0"], data["noise"], **options), case["old_log_prob"], what=f"{match[0]} old")
        assert_close(grad(logprob.sum(), new)[0], case["grad"], what=f"{match[0]} gradient")
        seen[match[0]] = case
    low, high = (float(c) for c in data["awm_ppo_ghuber__clip_range"])
    losses = [
        clipped_surrogate(case["log_prob"], case["old_log_prob"], data["advantages"], clip_low=-low, clip_high=high).mean()
        for name, case in seen.items() if "ghuber" in name
    ]  # fmt: skip
    expected = float(data["awm_ppo_ghuber__policy_loss"].item())
    assert min(abs(float(loss) - expected) for loss in losses) < 2e-5 * expected
