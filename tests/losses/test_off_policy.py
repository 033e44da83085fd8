"""The sampler is not the trainer: importance weights, rejection, decoupled PPO."""

import math

import pytest
import torch
from golden_numbers import assert_close, load_llm
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_rl.losses.masked import masked
from lit_rl.losses.off_policy import (
    approximate_proximal,
    high_entropy,
    importance_weights,
    m2po_mask,
    mismatch_metrics,
    negative_rows_off_policy,
    weight_metrics,
    within_bounds,
)

NAN = float("nan")


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_weights_by_hand():
    """Ratios 4, .25, 1 in a row (the last masked), bounds .5 and 2."""
    gap, mask = rows([math.log(4), math.log(0.25), 0.0]), torch.tensor([[True, True, False]])
    zero = torch.zeros_like(gap)
    weights = {
        ("token", None, 2.0, "clamp"): [2, 0.25, 0],
        ("token", 0.5, 2.0, "clamp"): [2, 0.5, 0],
        ("token", 0.5, 2.0, "zero"): [0, 0, 0],
        ("token", 0.2, 2.0, "zero"): [0, 0.25, 0],
        ("sequence", None, 2.0, "clamp"): [1, 1, 0],
        ("geometric", None, 2.0, "clamp"): [1, 1, 0],
    }
    for (level, low, high, outside), expected in weights.items():
        got = importance_weights(gap, zero, mask, level=level, low=low, high=high, outside=outside)
        torch.testing.assert_close(got, rows(expected), msg=str((level, outside)))


def test_a_long_row_is_outside_any_bound_of_the_product():
    """Trap 12: a ratio of 1.02 per token is e^2.5 over 128 of them; the geometric mean stays 1.02."""
    gap, mask = torch.full((1, 128), math.log(1.02)), torch.ones(1, 128, dtype=torch.bool)
    zero = torch.zeros_like(gap)
    assert (importance_weights(gap, zero, mask, level="sequence", high=3.0, outside="zero") == 0).all()
    torch.testing.assert_close(importance_weights(gap, zero, mask, level="geometric", high=3.0, outside="zero"), torch.full_like(gap, 1.02))


def test_bounds_are_those_of_the_ratio():
    """Trap 22: a ratio of 1.4 is inside [.5, 1.5] and one of .6 too; upstream's k1 would keep .67 ... 2."""
    gap, mask = rows([1.4, 0.6, 1.9, 0.45]).log(), torch.ones(1, 4, dtype=torch.bool)
    kept = within_bounds(gap, torch.zeros_like(gap), mask, metric="ratio", lower=0.5, upper=1.5)
    assert kept.tolist() == [[True, True, False, False]]


def test_what_the_sampler_did_not_say_counts_as_on_policy():
    gap, mask = rows([NAN, -math.inf, 0.5]), torch.tensor([[True, True, True]])
    assert importance_weights(gap, torch.zeros_like(gap), mask, high=1.0).tolist() == [[1, 1, 1]]
    assert all(v.isfinite() for v in weight_metrics(rows([0.1, NAN, 0.2]), rows([0.0, 0, 0]), mask, level="token", high=2.0).values())


@given(st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_m2po_drops_as_few_as_it_may(seed):
    g = torch.Generator().manual_seed(seed)
    gap, mask = torch.randn(3, 5, generator=g), torch.rand(3, 5, generator=g) < 0.7
    kept = m2po_mask(gap, torch.zeros_like(gap), mask, threshold=0.3)
    assert (kept & ~mask).sum() == 0
    square, count = gap.double() ** 2, int(kept.sum())
    if mask.any():
        assert count >= 1
        assert count == 1 or square[kept].mean() < 0.3
        assert square[kept].max() <= square[mask & ~kept].min() if (mask & ~kept).any() else True
        if count < mask.sum():
            one_more = square[mask].sort().values[: count + 1]
            assert one_more.mean() >= 0.3 or (count == 1 and square[kept].item() >= 0.3)


def test_proximal_between_two_versions():
    """Sampled at version 2, training makes 6: 5 is three of four steps on the way; tokens of unknown or the newest version stay."""
    got = approximate_proximal(rows([-1.0, -1, -1]), rows([-2.0, -2, -2]), torch.tensor([[2, -1, 6]]), version=6)
    torch.testing.assert_close(got, rows([-1.25, -2, -2]))


def test_rows_and_tokens_left_out_by_hand():
    new, behaved, mask = rows([0.0, 0, 9], [0, 0, 0]), rows([1.0, 0, -9], [1, 1, 1]), torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    assert negative_rows_off_policy(new, behaved, rows(-1, 1), mask, threshold=0.4).tolist() == [True, False]
    assert negative_rows_off_policy(new, behaved, rows(-1, -1), mask, threshold=0.6).tolist() == [False, True]
    assert high_entropy(rows([1.0, 2, 99], [3, 4, 5]), mask, share=0.4).tolist() == [[False, False, False], [False, True, True]]


@pytest.mark.golden
def test_weights_golden(golden_dir):
    data, _ = load_llm(golden_dir, "verl_rollout_correction")
    names = {
        "mean": "mean",
        "max": "max",
        "min": "min",
        "std": "std",
        "effective_share": "eff_sample_size",
        "share_high": "ratio_fraction_high",
        "share_low": "ratio_fraction_low",
    }
    cases = [key for key in data if key.startswith("is.") and key.endswith((".bn0", ".bn1"))]
    assert cases
    for case in cases:
        _, mask, level, *threshold, normalize = case.split(".")
        high = float(".".join(threshold)[1:])
        arguments = data["in.old_log_prob"], data["in.rollout_log_prob"], data[f"in.{mask}"].bool()
        weights = importance_weights(*arguments, level=level, high=high, normalize=normalize == "bn1")
        assert_close(weights, data[case], what=case)
        metrics = weight_metrics(*arguments, level=level, high=high)
        for ours, theirs in names.items():
            expected = data[f"{case}.rollout_is_{theirs}"].double()
            assert_close(metrics[ours].double(), expected, f64=2e-5 if ours != "std" else 1e-4, what=f"{case} {ours}")


@pytest.mark.golden
def test_rejection_golden(golden_dir):
    """verl's k1 is minus the log-ratio: its bounds lo_hi of exp(k1) are ours of the ratio, 1/hi to 1/lo."""
    data, _ = load_llm(golden_dir, "verl_rollout_correction")
    cases = [key for key in data if key.startswith("rs.")]
    assert cases
    for case in cases:
        _, mask, options, spec = case.split(".", 3)
        full = data[f"in.{mask}"].bool()
        kept = full
        for option, bounds in zip(options.split("+"), spec.removeprefix("t").split(","), strict=True):
            *over, metric = option.split("_")
            over = over[-1]
            if metric == "k1":
                low, high = bounds.split("_") if "_" in bounds else (1 / float(bounds), bounds)
                limits = {"metric": "ratio", "lower": 1 / float(high), "upper": 1 / float(low)}
            else:
                limits = {"metric": metric, "upper": float(bounds)}
            kept = kept & within_bounds(data["in.old_log_prob"], data["in.rollout_log_prob"], full, over=over, **limits)
        assert torch.equal(kept, data[case].bool()), case


@pytest.mark.golden
def test_mismatch_golden(golden_dir):
    data, _ = load_llm(golden_dir, "verl_rollout_correction")
    masks = sorted({key.split(".")[1] for key in data if key.startswith("offpolicy.")})
    assert masks
    other = {"k3": "k3_kl", "trainer_ppl": "training_ppl", "trainer_log_ppl": "training_log_ppl"}
    for mask in masks:
        ours = mismatch_metrics(data["in.old_log_prob"], data["in.rollout_log_prob"], data[f"in.{mask}"].bool())
        assert ours.pop("max_abs") > 0
        assert len(ours) == len([key for key in data if key.startswith(f"offpolicy.{mask}.")])
        for name, value in ours.items():
            assert_close(value.double(), data[f"offpolicy.{mask}.{other.get(name, name)}"].double(), f64=1e-4, what=name)


@pytest.mark.golden
def test_areal_golden(golden_dir):
    data, meta = load_llm(golden_dir, "areal_decoupled_ppo")
    prox, behave, mask = data["in.proximal_logprobs"], data["in.old_logprobs(behave)"], data["in.loss_mask"].bool()
    taus = [key for key in data if key.startswith("m2po.t")]
    assert taus
    for key in taus:
        assert torch.equal(m2po_mask(prox, behave, mask, threshold=float(key.removeprefix("m2po.t"))), data[key].bool()), key
    new, versions, version = data["in.logprobs"], data["prox.versions"], meta["prox"]["current_version"]
    for name, space in (("loglinear", "log"), ("linear", "probability")):
        got = approximate_proximal(new, behave, versions, version=version, space=space)
        assert_close(got, data[f"prox.{name}"], what=name)
    assert torch.equal(behave, data["prox.rollout"])


@pytest.mark.golden
def test_filtered_fraction_golden(golden_dir):
    """What the rules of decoupled PPO drop or clamp."""
    data, meta = load_llm(golden_dir, "areal_decoupled_ppo")
    prox, behave, mask = data["in.proximal_logprobs"], data["in.old_logprobs(behave)"], data["in.loss_mask"].bool()
    for case, options in meta["cases"].items():
        rule = options["rejection_sampling"]
        if rule is None:
            continue
        metric = {"ratio": "ratio", "kl_k1": "k1", "kl_k2": "k2", "kl_k3": "k3_reverse"}[rule["metric"]]
        over = rule["agg"] if rule["level"] == "sequence" else "token"
        kept = within_bounds(prox, behave, mask, metric=metric, over=over, lower=rule["lower"], upper=rule["upper"])
        if rule["action"] == "clamp":
            level = "geometric" if rule["level"] == "sequence" else "token"
            weights = importance_weights(prox, behave, mask, level=level, high=None)
            clamped = masked(weights.clamp(rule["lower"], rule["upper"]), mask)
            kept = mask & (kept | (clamped == weights))
        fraction = (mask & ~kept).sum() / mask.sum()
        assert_close(fraction.double(), data[f"{case}.filtered_fraction"], f64=1e-6, what=case)
