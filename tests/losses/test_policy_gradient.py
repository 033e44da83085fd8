"""The clipped surrogate, its metrics and GRPO-Guard."""

import json
import math

import pytest
import torch
from golden_numbers import assert_close, cases, f64, load
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import grad, gradcheck

from lit_rl.losses.policy_gradient import clipped_ratio_loss, clipped_surrogate, guard_logratio, policy_metrics


def test_surrogate_by_hand():
    """r = 1.5, 1.5, .5, .5, 1.1 with A = 1, -1, 1, -1, 2, low .2, high .3: -1.3 (clipped), 1.5, -.5, .8 (clipped), -2.2."""
    new, advantages = f64(1.5, 1.5, 0.5, 0.5, 1.1).log().requires_grad_(), f64(1, -1, 1, -1, 2)
    loss = clipped_surrogate(new, torch.zeros_like(new), advantages, clip_low=0.2, clip_high=0.3)
    torch.testing.assert_close(loss, f64(-1.3, 1.5, -0.5, 0.8, -2.2))
    torch.testing.assert_close(grad(loss.sum(), new)[0], f64(0, 1.5, -0.5, 0, -2.2))


def test_advantages_are_clipped_in_the_loss():
    loss = clipped_surrogate(f64(0.0, 0.0), f64(0.0, 0.0), f64(9, -7), clip_low=0.1, clip_high=0.1, adv_clip=5.0)
    assert loss.tolist() == [-5, 5]


@given(st.integers(0, 10_000), st.sampled_from([1e-5, 1e-4, 0.2]))
@settings(max_examples=30, deadline=None)
def test_on_policy_gradient_is_reinforce(seed, clip):
    """At new == logprobs, d/d theta sum w loss = -sum w A d logprob / d theta, and the loss is -A."""
    g = torch.Generator().manual_seed(seed)
    theta = torch.randn(4, generator=g, dtype=torch.float64, requires_grad=True)
    features = torch.randn(6, 3, 4, generator=g, dtype=torch.float64)
    advantages, weights = (torch.randn(6, 3, generator=g, dtype=torch.float64) for _ in range(2))
    new = (features @ theta).tanh()
    loss = clipped_surrogate(new, new.detach(), advantages, clip_low=clip, clip_high=clip)
    torch.testing.assert_close(loss, -advantages)
    surrogate = grad((loss * weights).sum(), theta, retain_graph=True)[0]
    torch.testing.assert_close(surrogate, grad(-(new * advantages * weights).sum(), theta)[0])


@pytest.mark.parametrize("pieces", [1, 2, 8])
def test_weights_make_the_gradient_independent_of_the_split(pieces):
    """Rows of unequal length, weighted once for the whole batch; however the rows are cut, the gradient is that of the mean over actions.

    The mean of per-piece means, which public trainers take, is not: shown for 8 pieces.
    """
    g = torch.Generator().manual_seed(3)
    theta = torch.randn(4, generator=g, dtype=torch.float64, requires_grad=True)
    features = torch.randn(16, 5, 4, generator=g, dtype=torch.float64)
    old, advantages = (torch.randn(16, 5, generator=g, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(16, 5, generator=g) < 0.6
    mask[:, 0] = True
    weights = mask.double() / mask.sum()

    def loss(rows):
        new = (features[rows] @ theta).tanh()
        return clipped_surrogate(new, old[rows].tanh(), advantages[rows], clip_low=0.2, clip_high=0.3)

    everything = torch.arange(16)
    whole = grad(loss(everything)[mask].mean(), theta)[0]
    cut = [(loss(rows) * weights[rows]).sum() for rows in everything.chunk(pieces)]
    torch.testing.assert_close(sum(grad(part, theta)[0] for part in cut), whole, rtol=1e-12, atol=1e-12)
    if pieces == 8:
        naive = sum(grad(loss(rows)[mask[rows]].mean() / pieces, theta)[0] for rows in everything.chunk(pieces))
        assert (naive - whole).abs().max() > 1e-3


def test_an_overflowing_ratio_has_no_nan_gradient():
    new = f64(1e4, -1e4, 1e4, -1e4).requires_grad_()
    loss = clipped_surrogate(new, torch.zeros_like(new), f64(1, 1, -1, 0), clip_low=0.2, clip_high=0.2)
    assert loss.isfinite().all()
    assert grad(loss.sum(), new)[0].isfinite().all()


def test_metrics_by_hand():
    """r = 1.5, .5, 1.1, 9 with weights 1, 1, 2, 0; low .2, high .3: a quarter above, a quarter below; mean (1.5 + .5 + 2.2) / 4."""
    new, weights = f64(1.5, 0.5, 1.1, 9.0).log(), f64(1, 1, 2, 0)
    metrics = policy_metrics(new, torch.zeros_like(new), clip_low=0.2, clip_high=0.3, weights=weights)
    squares = [math.log(1.5) ** 2, math.log(0.5) ** 2, 2 * math.log(1.1) ** 2]
    expected = {"approx_kl": sum(squares) / 8, "clip_fraction": 0.5, "clip_fraction_high": 0.25, "clip_fraction_low": 0.25}
    expected |= {"ratio_mean": 4.2 / 4, "ratio_max_dev": 0.5}
    assert {k: v.item() for k, v in metrics.items()} == pytest.approx(expected)
    assert all(v.ndim == 0 and not v.requires_grad for v in metrics.values())


def test_metrics_ignore_what_the_mask_hides():
    new = f64(0.0, float("nan"))
    metrics = policy_metrics(new, torch.zeros_like(new), clip_low=0.2, clip_high=0.2, weights=torch.tensor([True, False]))
    assert metrics["approx_kl"] == 0 and metrics["ratio_mean"] == 1 and metrics["ratio_max_dev"] == 0


def gaussian_logprobs(sample, mean, std):
    return torch.distributions.Normal(mean, std.view(-1, 1)).log_prob(sample).mean(1)


def test_guard_removes_the_mean_of_the_logratio():
    """x' = mu_old +- s z: over the pair, the plain log-ratio averages to -(mu - mu_old)^2 / (2 s^2), GRPO-Guard's to 0."""
    g = torch.Generator().manual_seed(0)
    old_mean, z = (torch.randn(4, 7, generator=g, dtype=torch.float64) for _ in range(2))
    mean = old_mean + 0.1 * torch.randn(4, 7, generator=g, dtype=torch.float64)
    std = f64(0.1, 0.3, 0.5, 0.7)
    plain, guarded = [], []
    for sign in (1, -1):
        sample = old_mean + sign * std[:, None] * z
        new, old = gaussian_logprobs(sample, mean, std), gaussian_logprobs(sample, old_mean, std)
        plain.append(new - old)
        guarded.append(guard_logratio(new, old, mean, old_mean, noise_std=std))
    torch.testing.assert_close((plain[0] + plain[1]) / 2, -(mean - old_mean).pow(2).mean(1) / (2 * std**2))
    torch.testing.assert_close((guarded[0] + guarded[1]) / 2, torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0)


def test_guard_rows_are_independent_and_noiseless_rows_are_harmless():
    g = torch.Generator().manual_seed(0)
    new, old = (torch.randn(3, generator=g, dtype=torch.float64) for _ in range(2))
    mean, old_mean = (torch.randn(3, 2, 2, generator=g, dtype=torch.float64) for _ in range(2))
    std = f64(0.3, 0.0, 0.5)
    whole = guard_logratio(new, old, mean, old_mean, noise_std=std)
    for i in range(3):
        row = slice(i, i + 1)
        torch.testing.assert_close(guard_logratio(new[row], old[row], mean[row], old_mean[row], noise_std=std[row]), whole[row])
    assert whole[1] == 0
    assert gradcheck(lambda n, m: guard_logratio(n, old, m, old_mean, noise_std=std), (new.requires_grad_(), mean.requires_grad_()))


def golden_loss(golden_dir, tag):
    data = load(golden_dir / "diffusion", "grpo_loss")
    (_, shared), *_ = cases(data, tag)
    return data, shared


@pytest.mark.golden
@pytest.mark.parametrize("tag", ["f32", "f64"])
def test_flow_grpo_dance_and_mix_policy_losses(golden_dir, tag):
    data, shared = golden_loss(golden_dir, tag)
    for match, case in cases(data, rf"{tag}__case\d+_j(\d+)"):
        column = int(match[1])
        clip, _, adv_clip = case["params"].tolist()
        new, old, advantages = (
            case["log_prob"].clone().requires_grad_(),
            shared["old_log_probs"][:, column],
            shared["advantages"][:, column],
        )
        policy = clipped_surrogate(new, old, advantages, clip_low=clip, clip_high=clip, adv_clip=adv_clip).mean()
        assert_close(policy, case["policy_loss"], what=match[0])
        assert_close(grad(policy, new)[0], case["grad_log_prob"], what=match[0])
        metrics = policy_metrics(new, old, clip_low=clip, clip_high=clip)
        assert_close((new - old).exp(), case["ratio"], what=match[0])
        assert_close(metrics["approx_kl"], case["approx_kl"], f32=2e-4, what=match[0])
        for ours, theirs in (
            ("clip_fraction", "clipfrac"),
            ("clip_fraction_high", "clipfrac_gt_one"),
            ("clip_fraction_low", "clipfrac_lt_one"),
        ):
            assert_close(metrics[ours], case[theirs], what=f"{match[0]} {ours}")
        for key in (k for k in case if k.startswith("dance_loss")):
            assert_close(policy / _divisor(key), case[key], what=f"{match[0]} {key}")


def _divisor(key: str) -> int:
    """..._ga3_T4: gradient accumulation times timesteps."""
    accumulation, steps = key.split("_ga")[1].split("_T")
    return int(accumulation) * int(steps)


@pytest.mark.golden
@pytest.mark.parametrize("tag", ["f32", "f64"])
def test_guard_losses(golden_dir, tag):
    """Flow-GRPO's bias is one number per micro-batch and its loss is divided by -dt; Flow-Factory's bias is per sample, with one std."""
    data, shared = golden_loss(golden_dir, tag)
    for match, case in cases(data, rf"{tag}__guard\d+"):
        clip, old, advantages = float(case["clip_range"]), shared["old_log_probs"][:, 0], shared["advantages"][:, 0]
        root = shared["sqrt_neg_dt"].flatten()
        for who, std, divisor in (
            ("fg", shared["std_dev_t"].mean() * root.mean(), root.mean() ** 2),
            ("ff", case["ff_std_dev_t_shared"] * root, 1.0),
        ):
            new, mean = case["log_prob"].clone().requires_grad_(), case["mean"].clone().requires_grad_()
            log_ratio = guard_logratio(new, old, mean, shared["old_mean"], noise_std=std.expand_as(old))
            if who == "fg":
                bias = (mean - shared["old_mean"]).pow(2).flatten(1).mean(1)
                log_ratio = log_ratio + (bias.mean() - bias) / (2 * std)
            loss = clipped_ratio_loss(log_ratio, advantages, clip_low=clip, clip_high=clip, adv_clip=5.0).mean() / divisor
            assert_close(log_ratio.exp(), case[f"{who}_ratio"], what=f"{match[0]} {who}")
            assert_close(loss, case[f"{who}_loss"], what=f"{match[0]} {who}")
            by_new, by_mean = grad(loss, (new, mean))
            assert_close(by_new, case[f"{who}_grad_log_prob"], what=f"{match[0]} {who}")
            assert_close(by_mean, case[f"{who}_grad_mean"], what=f"{match[0]} {who}")
        ratio = case["fg_ratio"].double()
        assert_close(((ratio - 1).abs() > clip).float().mean(), case["fg_clipfrac"])


@pytest.mark.golden
def test_calligrapher_grpo(golden_dir):
    """The guide's trainer: advantages clipped to +-5, symmetric clip."""
    described = json.loads((golden_dir / "calligrapher" / "rl.json").read_text())["cases"]
    data = load(golden_dir / "calligrapher", "rl")
    described = [c for c in described if c.get("fn") == "GRPOTrainer.compute_grpo_loss"]
    assert described
    for case in described:
        new, old, advantages = (data[f"{case['key']}/{name}"] for name in ("log_prob", "old_log_prob", "adv"))
        new = new.clone().requires_grad_()
        loss = clipped_surrogate(new, old, advantages, clip_low=case["clip_range"], clip_high=case["clip_range"], adv_clip=5.0).mean()
        assert_close(loss, data[f"{case['key']}/loss"])
        assert_close(grad(loss, new)[0], data[f"{case['key']}/grad"])
        metrics = policy_metrics(new, old, clip_low=case["clip_range"], clip_high=case["clip_range"])
        assert metrics["ratio_mean"].item() == pytest.approx(case["terms"]["ratio_mean"], rel=1e-5)
