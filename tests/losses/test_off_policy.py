"""The sampler is not the trainer: importance weights, rejection, decoupled PPO."""

import math

import pytest
import torch
from golden_numbers import assert_close, f64, load_llm

from lit_rl.losses.masked import masked
from lit_rl.losses.off_policy import Correction, Rejection, importance_weights, sampler_kl, within_bounds

NAN = float("nan")


def test_weights_by_hand():
    """Ratios 4, .25, 1 in a row (the last masked), bounds .5 and 2."""
    gap, mask = f64([math.log(4), math.log(0.25), 0.0]), torch.tensor([[True, True, False]])
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
        torch.testing.assert_close(got, f64(expected), msg=str((level, outside)))


def test_a_long_row_is_outside_any_bound_of_the_product():
    """Trap 12: a ratio of 1.02 per token is e^2.5 over 128 of them; the geometric mean stays 1.02."""
    gap, mask = torch.full((1, 128), math.log(1.02)), torch.ones(1, 128, dtype=torch.bool)
    zero = torch.zeros_like(gap)
    assert (importance_weights(gap, zero, mask, level="sequence", high=3.0, outside="zero") == 0).all()
    torch.testing.assert_close(importance_weights(gap, zero, mask, level="geometric", high=3.0, outside="zero"), torch.full_like(gap, 1.02))


def test_bounds_are_those_of_the_ratio():
    """Trap 22: a ratio of 1.4 is inside [.5, 1.5] and one of .6 too; upstream's k1 would keep .67 ... 2."""
    gap, mask = f64([1.4, 0.6, 1.9, 0.45]).log(), torch.ones(1, 4, dtype=torch.bool)
    kept = within_bounds(gap, torch.zeros_like(gap), mask, metric="ratio", lower=0.5, upper=1.5)
    assert kept.tolist() == [[True, True, False, False]]


def test_what_the_sampler_did_not_say_counts_as_on_policy():
    gap, mask = f64([NAN, -math.inf, 0.5]), torch.tensor([[True, True, True]])
    assert importance_weights(gap, torch.zeros_like(gap), mask, high=1.0).tolist() == [[1, 1, 1]]


@pytest.mark.golden
def test_weights_golden(golden_dir):
    data, _ = load_llm(golden_dir, "verl_rollout_correction")
    cases = [key for key in data if key.startswith("is.") and key.endswith(".bn0")]
    assert cases
    for case in cases:
        _, mask, level, *threshold, _ = case.split(".")
        high = float(".".join(threshold)[1:])
        arguments = data["in.old_log_prob"], data["in.rollout_log_prob"], data[f"in.{mask}"].bool()
        assert_close(Correction(level=level, high=high)(*arguments), data[case], what=case)


@pytest.mark.golden
def test_sampler_kl_golden(golden_dir):
    data, _ = load_llm(golden_dir, "verl_rollout_correction")
    masks = sorted({key.split(".")[1] for key in data if key.startswith("offpolicy.")})
    assert masks
    for mask in masks:
        ours = sampler_kl(data["in.old_log_prob"], data["in.rollout_log_prob"], data[f"in.{mask}"].bool())
        assert_close(ours.double(), data[f"offpolicy.{mask}.kl"].double(), f64=1e-4, what=mask)


def test_a_correction_may_reject_by_another_measure():
    """Ratios 4 and 1.1: truncated to 2 and 1.1; of their k3, 4 - 1 - log 4 = 1.6 and 0.005, the first is too large."""
    gap, mask = f64([math.log(4), math.log(1.1)]), torch.tensor([[True, True]])
    zero = torch.zeros_like(gap)
    torch.testing.assert_close(Correction()(gap, zero, mask), f64([2.0, 1.1]))
    kept = Correction(reject=Rejection(metric="k3", upper=0.5))(gap, zero, mask)
    torch.testing.assert_close(kept, f64([0.0, 1.1]))
    assert Correction()(gap, None, mask) == 1.0  # the sampler is the trainer


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
def test_filtered_fraction_golden(golden_dir):
    """The share of tokens that the rules of decoupled PPO drop or clamp."""
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
