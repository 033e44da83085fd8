"""Distances to a reference under their published names, and flow matching."""

from typing import get_args

import pytest
import torch
from golden_numbers import assert_close, cases, load
from torch.autograd import grad, gradcheck

from lit_rl.losses.flow import KLKind, flow_matching_loss, gaussian_kl
from lit_rl.losses.policy_gradient import clipped_surrogate

KINDS = get_args(KLKind)


def draws(seed=0, rows=3):
    g = torch.Generator().manual_seed(seed)
    new, ref = (torch.randn(rows, 2, 3, generator=g, dtype=torch.float64) for _ in range(2))
    return (
        new,
        ref,
        {
            "diffusion": torch.rand(rows, generator=g, dtype=torch.float64) + 0.1,
            "noise_std": torch.rand(rows, generator=g, dtype=torch.float64) + 0.1,
        },
    )


def test_kl_kinds_by_hand():
    """new - ref = (1, 3): mean square 5; g = 2, noise_std = .5."""
    new, ref = torch.tensor([[1.0, 3.0]], dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)
    scales = {"diffusion": torch.tensor([2.0], dtype=torch.float64), "noise_std": torch.tensor([0.5], dtype=torch.float64)}
    expected = {
        "x_diffusion": 5 / 8,
        "x_noise_std": 10.0,
        "x": 5.0,
        "v": 5.0,
        "v_diffusion": 5 / (8 + 1e-7),
        "v_noise_std": 5 / (0.5 + 1e-7),
    }
    assert set(expected) == set(KINDS)
    for kind, value in expected.items():
        assert gaussian_kl(new, ref, kind=kind, **scales).item() == pytest.approx(value, rel=1e-12)


def test_x_noise_std_is_the_kl_of_two_gaussians():
    new, ref, scales = draws()
    std = scales["noise_std"].view(-1, 1, 1)
    exact = torch.distributions.kl_divergence(torch.distributions.Normal(new, std), torch.distributions.Normal(ref, std))
    torch.testing.assert_close(gaussian_kl(new, ref, kind="x_noise_std", **scales), exact.flatten(1).mean(1))


@pytest.mark.parametrize("kind", KINDS)
def test_kl_pulls_towards_the_reference(kind):
    """Zero with zero gradient at the reference; elsewhere the gradient points away from it, so descent goes towards it."""
    new, ref, scales = draws()
    new.requires_grad_()
    kl = gaussian_kl(new, ref, kind=kind, **scales)
    assert (kl > 0).all()
    (slope,) = grad(kl.sum(), new)
    assert ((slope * (new - ref)) > 0).all()
    same = ref.clone().requires_grad_()
    kl = gaussian_kl(same, ref, kind=kind, **scales)
    assert (kl == 0).all() and (grad(kl.sum(), same)[0] == 0).all()
    assert gradcheck(lambda n: gaussian_kl(n, ref, kind=kind, **scales), new)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_noise_are_finite(kind):
    new, ref, scales = draws()
    scales = {k: s * torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64) for k, s in scales.items()}
    new.requires_grad_()
    kl = gaussian_kl(new, ref, kind=kind, **scales)
    assert kl.isfinite().all() and grad(kl.sum(), new)[0].isfinite().all()
    if kind in ("x_diffusion", "x_noise_std"):
        assert kl[1] == 0


def test_a_missing_scale_is_named():
    new, ref, _ = draws()
    with pytest.raises(ValueError, match="pass noise_std="):
        gaussian_kl(new, ref, kind="x_noise_std")
    with pytest.raises(ValueError, match="pass diffusion="):
        gaussian_kl(new, ref, kind="x_diffusion")


def test_flow_matching_by_hand():
    """v - (noise - x0) = (1 - (2 - 3), 0 - (1 - 1)) = (2, 0): mean square 2."""
    v, x0, noise = torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 1.0]]), torch.tensor([[2.0, 1.0]])
    assert flow_matching_loss(v, x0, noise).tolist() == [2.0]
    assert flow_matching_loss(noise - x0, x0, noise).tolist() == [0.0]


@pytest.mark.golden
@pytest.mark.parametrize("tag", ["f32", "f64"])
def test_flow_grpo_losses(golden_dir, tag):
    data = load(golden_dir / "diffusion", "grpo_loss")
    (_, shared), *_ = cases(data, tag)
    for match, case in cases(data, rf"{tag}__case\d+_j(\d+)"):
        column = int(match[1])
        clip, beta, adv_clip = case["params"].tolist()
        old, advantages = shared["old_log_probs"][:, column], shared["advantages"][:, column]
        new, mean = case["log_prob"].clone().requires_grad_(), shared["prev_sample_mean"].clone().requires_grad_()
        policy = clipped_surrogate(new, old, advantages, clip_low=clip, clip_high=clip, adv_clip=adv_clip).mean()
        loss = policy
        if beta > 0:
            kl = gaussian_kl(mean, shared["ref_mean"], kind="x_diffusion", diffusion=shared["std_dev_t"].flatten()).mean()
            assert_close(kl, case["kl_loss"], what=match[0])
            loss = policy + beta * kl
            assert_close(grad(loss, mean, retain_graph=True)[0], case["grad_mean"], what=match[0])
        assert_close(loss, case["loss"], what=match[0])


@pytest.mark.golden
@pytest.mark.parametrize("tag", ["f32", "f64"])
def test_flow_factory_losses(golden_dir, tag):
    data = load(golden_dir / "diffusion", "grpo_loss")
    (_, shared), *_ = cases(data, tag)
    for match, case in cases(data, rf"{tag}__ff_([xv])-based"):
        low, high, beta = case["params"].tolist()
        new, prediction = case["log_prob"].clone().requires_grad_(), shared["prev_sample_mean"].clone().requires_grad_()
        policy = clipped_surrogate(
            new, shared["old_log_probs"][:, 0], shared["advantages"][:, 0], clip_low=-low, clip_high=high, adv_clip=5.0
        )
        kl = gaussian_kl(prediction, shared["ref_mean"], kind=match[1]).mean()
        loss = policy.mean() + beta * kl
        assert_close(kl, case["kl_div"], what=match[0])
        assert_close(loss, case["loss"], what=match[0])
        by_new, by_prediction = grad(loss, (new, prediction))
        assert_close(by_new, case["grad_log_prob"], what=match[0])
        assert_close(by_prediction, case["grad_pred"], what=match[0])


@pytest.mark.golden
@pytest.mark.parametrize("tag", ["f32", "f64"])
def test_genrl_losses(golden_dir, tag):
    """CPS divides its KL by 2 * 1/2. LongCat's weights are not of this project; on CPS steps the authors leave them out, too."""
    data = load(golden_dir / "diffusion", "grpo_loss")
    (_, shared), *_ = cases(data, tag)
    _, _, clip, beta = data["genrl_params_sigma_sigmamax_clip_beta"].tolist()
    root = shared["sqrt_neg_dt"].flatten()
    for match, case in cases(data, rf"{tag}__genrl_flow_(?:(sde)_none|cps_(?:none|longcat))"):
        sde = match[1] == "sde"
        new = case["log_prob"].clone().requires_grad_()
        policy = clipped_surrogate(
            new, shared["old_log_probs"][:, 0], shared["advantages"][:, 0], clip_low=clip, clip_high=clip, adv_clip=5.0
        ).mean()
        noise_std = shared["std_dev_t"].flatten() * root
        kl = gaussian_kl(shared["prev_sample_mean"], shared["ref_mean"], kind="x_noise_std" if sde else "x", noise_std=noise_std).mean()
        loss = policy + beta * kl
        assert_close(policy, case["policy_loss"], what=match[0])
        assert_close(kl, case["kl_loss"], what=match[0])
        assert_close(loss, case["loss"], what=match[0])
        assert_close(grad(loss, new)[0], case["grad_log_prob"], what=match[0])
