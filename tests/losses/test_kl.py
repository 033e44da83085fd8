"""KL estimates and the coefficient's controllers."""

import pytest
import torch
from golden_numbers import assert_close, load_llm
from torch.autograd import grad

from lit_rl.errors import ConfigError
from lit_rl.losses.kl import AdaptiveKL, RewardKL, kl_estimate
from lit_rl.losses.masked import row_mean

UPSTREAM = {"kl": "k1", "mse": "k2", "low_var_kl": "k3"}


def test_estimates_by_hand():
    """x = log 2: log 2, log2^2 / 2, 1/2 - 1 + log 2."""
    new, ref = torch.tensor([2.0, 0.5]).double().log(), torch.zeros(2, dtype=torch.float64)
    log2 = torch.tensor(2.0).double().log()
    torch.testing.assert_close(kl_estimate(new, ref, kind="k1"), torch.stack([log2, -log2]))
    torch.testing.assert_close(kl_estimate(new, ref, kind="abs"), torch.stack([log2, log2]))
    torch.testing.assert_close(kl_estimate(new, ref, kind="k2"), torch.stack([log2**2 / 2, log2**2 / 2]))
    torch.testing.assert_close(kl_estimate(new, ref, kind="k3"), torch.stack([log2 - 0.5, 1 - log2]))


@pytest.mark.parametrize("kind", ["k1", "k3", "abs"])
def test_plus_has_the_value_of_the_kind_and_the_gradient_of_k2(kind):
    """Trap 7: verl documents these names and refuses them."""
    new = torch.randn(9, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    ref = torch.linspace(-1, 1, 9, dtype=torch.float64)
    straight = kl_estimate(new, ref, kind=kind + "+")
    torch.testing.assert_close(straight, kl_estimate(new, ref, kind=kind))
    torch.testing.assert_close(grad(straight.sum(), new)[0], new.detach() - ref)


def test_controllers_keep_their_coefficient():
    adaptive = AdaptiveKL(0.1, target=0.1, horizon=100)
    adaptive.update(1.0, sequences=10)  # clipped to +0.2
    assert adaptive.coef == pytest.approx(0.1 * (1 + 0.2 * 0.1))
    again = AdaptiveKL(0.5, target=0.1, horizon=100)
    again.load_state_dict(adaptive.state_dict())
    adaptive.update(0.09, sequences=5), again.update(0.09, sequences=5)
    assert again.coef == adaptive.coef == pytest.approx(0.102 * (1 - 0.1 * 0.05))
    fixed = RewardKL(coef=0.3).controller()
    fixed.update(9.0, sequences=100)
    assert fixed.coef == 0.3
    assert isinstance(RewardKL(coef=0.3, target=0.1).controller(), AdaptiveKL)
    with pytest.raises(ConfigError, match="target=0.0"):
        RewardKL(coef=0.1, target=0.0)


@pytest.mark.golden
def test_estimates_golden(golden_dir):
    data, _ = load_llm(golden_dir, "verl_misc")
    ref = data["in.ref_log_prob"]
    kinds = [key.split(".")[1] for key in data if key.startswith("kl.") and key.endswith(".value")]
    assert kinds
    for kind in kinds:
        new = data["in.log_prob"].clone().requires_grad_()
        value = kl_estimate(new, ref, kind=UPSTREAM.get(kind, kind))
        assert_close(value, data[f"kl.{kind}.value"], what=kind)
        assert_close(grad(value.sum(), new)[0], data[f"kl.{kind}.grad_sum"], what=kind)
    assert_close(kl_estimate(data["in.log_prob"], data["kl.low_var_kl.far_ref"], kind="k3"), data["kl.low_var_kl.far_value"])


@pytest.mark.golden
def test_estimates_of_other_frameworks(golden_dir):
    data, _ = load_llm(golden_dir, "openrlhf_slime_torchtune")
    new, ref = data["in.log_prob"], data["in.ref_log_prob"]
    for kind in ("k1", "k2", "k3"):
        assert_close(kl_estimate(new, ref, kind=kind), data[f"openrlhf.kl.{kind}"])
        assert_close(kl_estimate(new, ref, kind=kind), data[f"slime.kl.{kind}"])
    assert_close(kl_estimate(new, ref, kind="k3"), data["slime.kl.low_var_kl"])
    areal, _ = load_llm(golden_dir, "areal_decoupled_ppo")
    for kind in ("k1", "k2", "k3"):
        assert_close(kl_estimate(areal["in.logprobs"], areal["kl.ref"], kind=kind), areal[f"kl.{kind}"])


@pytest.mark.golden
def test_adaptive_controller_golden(golden_dir):
    data, meta = load_llm(golden_dir, "verl_misc")
    options = meta["klctl"]
    controller, values = AdaptiveKL(float(options["init"]), target=float(options["target"]), horizon=options["horizon"]), []
    for kl in data["klctl.kls"].tolist():
        controller.update(kl, sequences=options["n_steps"])
        values.append(controller.coef)
    assert_close(torch.tensor(values, dtype=torch.float64), data["klctl.values"])


@pytest.mark.golden
def test_kl_in_the_reward_golden(golden_dir):
    """verl's apply_kl_penalty: the coefficient of before the update costs, the mean over rows of the rows' means updates it."""
    data, meta = load_llm(golden_dir, "verl_misc")
    options = meta["apply_kl"]
    mask = data[f"in.{options['mask']}"].bool()
    for kind in [key.split(".")[1] for key in data if key.startswith("apply_kl.") and key.endswith("current_kl")]:
        kl = torch.where(mask, kl_estimate(data["in.old_log_prob"], data["in.ref_log_prob"], kind=UPSTREAM.get(kind, kind)), 0.0)
        controller = AdaptiveKL(float(options["init_coef"]), target=float(options["target"]), horizon=options["horizon"])
        assert_close(data["in.token_level_rewards"] - controller.coef * kl, data[f"apply_kl.{kind}.token_level_rewards"], what=kind)
        current = row_mean(kl, mask).mean()
        assert_close(current.double(), data[f"apply_kl.{kind}.current_kl"], f64=2e-5)
        controller.update(current.item(), sequences=options["n_steps"])
        assert controller.coef == pytest.approx(data[f"apply_kl.{kind}.coef_after"].item(), rel=2e-5)
