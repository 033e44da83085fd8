"""Decays of moving averages, and the average itself."""

from functools import partial

import pytest
import torch
from golden_numbers import assert_close, load

from lit_rl.policies.weights.decay import (
    OLD_POLICY_DECAYS,
    ema_decay,
    ema_is_due,
    ema_update,
    ramp_decay,
)


def test_update_is_exact_at_both_ends():
    old, new = torch.randn(2, 100, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ema_update(old, new, decay=0.0), new)
    assert torch.equal(ema_update(old, new, decay=1.0), old)
    torch.testing.assert_close(ema_update(old, new, decay=0.9), 0.9 * old + 0.1 * new)


def test_average_of_a_constant_is_that_constant():
    x = torch.randn(50, generator=torch.Generator().manual_seed(0))
    for decay in (0.1, 0.5, 0.9, 0.999):
        assert torch.equal(ema_update(x, x, decay=decay), x)


def test_ema_forgets_its_start():
    """The weight of the initial value is the product of the decays: below 1e-6 after 100 steps that warm up to 0.9."""
    ema = torch.ones(1, dtype=torch.float64)
    product = 1.0
    for step in range(100):
        ema = ema_update(ema, torch.zeros(1, dtype=torch.float64), decay=ema_decay(step, decay=0.9))
        product *= min((1 + step) / (10 + step), 0.9)
    assert ema.item() == pytest.approx(product, rel=1e-12) and product < 1e-6


def test_old_policy_decays_by_hand():
    assert [ramp_decay(s, **OLD_POLICY_DECAYS["copy"]) for s in (0, 100)] == [0, 0]
    assert [ramp_decay(s, **OLD_POLICY_DECAYS["slow"]) for s in (0, 100, 500, 900)] == pytest.approx([0, 0.1, 0.5, 0.5])
    assert [ramp_decay(s, **OLD_POLICY_DECAYS["late"]) for s in (0, 75, 79, 300)] == pytest.approx([0, 0, 0.03, 0.999])
    assert ramp_decay(7, **OLD_POLICY_DECAYS["frozen"]) == 1


def test_ema_interval():
    assert [s for s in range(20) if ema_is_due(s, interval=8)] == [7, 15]
    assert all(ema_is_due(s, interval=1) for s in range(5))


@pytest.mark.golden
def test_published_decays(golden_dir):
    data = load(golden_dir / "diffusion", "decay_schedules")
    steps = data["step"].tolist()

    def check(key, function):
        assert_close(torch.tensor([function(s) for s in steps], dtype=torch.float64), data[key], what=key)

    names = list(OLD_POLICY_DECAYS)
    for key in (k for k in data if k.startswith("return_decay_type")):
        kind = names[int(key.removeprefix("return_decay_type"))]
        check(key, partial(ramp_decay, **OLD_POLICY_DECAYS[kind]))
    for key in (k for k in data if k.startswith("crd_decay_")):
        name = key.removeprefix("crd_decay_")
        if name == "custom":
            start, value, slope, end = map(float, data["crd_custom_spec"].split("-"))
            check(key, partial(ramp_decay, start=start, value=value, slope=slope, end=end))
        else:
            check(key, partial(ramp_decay, **OLD_POLICY_DECAYS[names[int(name)]]))
    for key in (k for k in data if k.startswith("ema_wrapper_decay_")):
        decay = float(key.removeprefix("ema_wrapper_decay_"))
        check(key, partial(ema_decay, decay=decay))


@pytest.mark.golden
def test_flow_factory_decays(golden_dir):
    """The file holds values only, so the parameters are read off them: ends, first value, corner."""
    data = load(golden_dir / "diffusion", "decay_schedules")
    steps = data["step"].tolist()

    def check(key, function):
        assert_close(torch.tensor([function(s) for s in steps], dtype=torch.float64), data[key], what=key)

    constant, power = data["ff_ema_constant"], data["ff_ema_power"]
    check("ff_ema_constant", partial(ramp_decay, value=constant[0].item(), end=constant[0].item()))
    check("ff_ema_power", partial(ema_decay, decay=power[-1].item(), warmup_steps=round(1 / power[0].item())))

    piecewise = data["ff_ema_piecewise"]
    start = int((piecewise > 0).nonzero()[0]) - 1
    slope = round(piecewise[start + 1].item(), 10)
    check("ff_ema_piecewise", partial(ramp_decay, start=start, slope=slope, end=piecewise[-1].item()))


@pytest.mark.golden
def test_ema_traces(golden_dir):
    data = load(golden_dir / "diffusion", "ema")
    decay, steps = float(data["decay"]), int(data["n_steps"])
    tags = sorted({k.split("_")[0] for k in data if "_init_" in k})
    assert tags
    for tag in tags:
        tensors = sorted(int(k.rsplit("_", 1)[1]) for k in data if k.startswith(f"{tag}_init_"))
        trained, frozen = tensors[:-1], tensors[-1]
        for interval in data["intervals"].tolist():
            ema = {i: data[f"{tag}_init_{i}"] for i in tensors}
            for step in range(steps):
                if ema_is_due(step, interval=interval):
                    rate = ema_decay(step, decay=decay)
                    ema |= {i: ema_update(ema[i], data[f"{tag}_param_step{step}_{i}"], decay=rate) for i in trained}
                for i in tensors:
                    assert_close(ema[i], data[f"{tag}_interval{interval}_ema_step{step}_{i}"], what=f"{tag} {interval} {step} {i}")
            assert torch.equal(ema[frozen], data[f"{tag}_init_{frozen}"])


@pytest.mark.golden
def test_old_policy_updates(golden_dir):
    data = load(golden_dir / "diffusion", "ema")
    keys = [k for k in data if k.startswith("oldpolicy_type")]
    assert keys
    for key in keys:
        kind, step = key.removeprefix("oldpolicy_type").split("_step")
        decay = ramp_decay(int(step), **list(OLD_POLICY_DECAYS.values())[int(kind)])
        assert_close(ema_update(data["oldpolicy_tgt"], data["oldpolicy_src"], decay=decay), data[key], what=key)
