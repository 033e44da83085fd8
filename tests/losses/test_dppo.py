"""DPPO: the authors' and verl's numbers, a case by hand, and a miniature that learns with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from golden_numbers import assert_close, load_pack
from learners import rewards_rise
from torch.autograd import grad

from lit_rl.credit.weights import token_weights
from lit_rl.errors import ConfigError
from lit_rl.losses.dppo import DPPO
from lit_rl.methods.grpo import GRPO


def test_a_token_leaves_where_it_moves_away_by_hand() -> None:
    """mu = 0.4, bounds 0.1: p = 0.55 leaves with A = 1, stays with A = -1; p = 0.2 the other way round; 0.45 always stays."""
    new = torch.tensor([[0.55, 0.55, 0.2, 0.2, 0.45]], dtype=torch.float64).log().requires_grad_()
    old, good = torch.full_like(new, 0.4).log().detach(), torch.tensor([[1.0, -1.0, 1.0, -1.0, 1.0]], dtype=torch.float64)
    losses, metrics = DPPO(low=0.1, high=0.1)(new, old, good, torch.ones_like(new, dtype=torch.bool))
    expected = -good * (new.detach() - old).exp() * torch.tensor([[0.0, 1.0, 1.0, 0.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(grad(losses.sum(), new)[0], expected)
    assert float(metrics["clip_fraction_high"]) == pytest.approx(0.2) == float(metrics["clip_fraction_low"])


@pytest.mark.golden
def test_masks_and_gradients_are_the_authors_and_verls(golden_dir: Path) -> None:
    data, meta = load_pack(golden_dir, "dppo")
    ours = {case: options for case, options in meta["cases"].items() if options["impl"] in ("verl", "Stable-RL (authors)")}
    assert ours
    for case, o in ours.items():
        mask, advantages = data[f"in.{o['mask']}"].bool(), data[f"in.{o.get('adv', 'advantages')}"]
        new = data["in.log_prob"].clone().requires_grad_()
        anchor: Any = "trainer" if o.get("mask_anchor") == "old_log_prob" else "sampler"
        dppo = DPPO(divergence=o["kind"], low=o["delta_low"], high=o["delta_high"], cap=o["ratio_cap"], anchor=anchor)
        losses, metrics = dppo(new, data["in.old_log_prob"], advantages, mask, behaviour=data[f"in.{o['anchor']}"])
        if o.get("is_weights"):
            losses = losses * data["in.rollout_is_weights"]
        mode = {"seq-mean-token-sum-norm": "dr-grpo"}.get(o["agg"], o["agg"])  # this verl divides by the rows as well
        scale = mask.shape[1] if mode == "dr-grpo" else None
        weights = mask.double() if mode == "token-sum" else token_weights(mask, mode, scale=scale, dtype=torch.float64)
        loss = (losses * weights).sum()
        near = 1e-8 if o["agg"] == "seq-mean-token-mean" else 1e-12  # verl adds 1e-8 to the tokens that it divides a row by
        assert_close(loss, data[f"{case}.loss"], f64=near, what=case)
        assert_close(grad(loss, new)[0], data[f"{case}.grad_log_prob"], f64=near, what=case)
        if o["impl"] == "verl":  # the authors leave tokens without an advantage out of the share
            assert_close(metrics["clip_fraction"], data[f"{case}.clipfrac"], f64=1e-6, what=case)


def test_bounds_must_be_above_0() -> None:
    with pytest.raises(ConfigError, match=r"model.surrogate.low=0.0"):
        DPPO(low=0.0)


@pytest.mark.slow
def test_a_miniature_learns(sorting_lm: Path) -> None:
    rewards_rise(sorting_lm, GRPO, surrogate=DPPO(), prompts_per_update=16)
