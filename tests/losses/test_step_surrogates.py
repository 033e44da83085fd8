"""Surrogates of denoising steps, against the authors' numbers and by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lit_rl.errors import ConfigError
from lit_rl.losses.step_surrogates import DPPO, Clip, Guard, StepSurrogate


def inputs(seed: int = 0) -> dict[str, Tensor]:
    """8 pairs of latents of 6 elements, near the policy that acted."""
    generator = torch.Generator().manual_seed(seed)
    old, mean = torch.randn(8, generator=generator).double(), torch.randn(8, 2, 3, generator=generator).double()
    near = 0.1 * torch.randn(8, generator=generator).double()
    moved = 0.1 * torch.randn(8, 2, 3, generator=generator).double()
    return {
        "new": (old + near).requires_grad_(), "old": old, "advantages": torch.randn(8, generator=generator).double(),
        "weights": torch.full((8,), 0.125).double(), "mean": mean, "old_mean": mean + moved,
        "noise_std": torch.linspace(0.2, 0.9, 8).double(),
    }  # fmt: skip


def call(surrogate: StepSurrogate, given: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    rest = dict(given)
    return surrogate(rest.pop("new"), rest.pop("old"), rest.pop("advantages"), **rest)  # type: ignore[arg-type]


@pytest.mark.parametrize("surrogate", [Clip(), DPPO()])
def test_on_policy_the_gradient_is_reinforces(surrogate: StepSurrogate) -> None:
    given = inputs()
    given |= {"new": given["old"].clone().requires_grad_(), "mean": given["old_mean"]}
    losses, metrics = call(surrogate, given)
    losses.sum().backward()
    torch.testing.assert_close(given["new"].grad, -given["advantages"])
    assert metrics["ratio_max_dev"] == 0 and metrics["approx_kl"] == 0


def test_guard_at_the_old_policy_scales_the_gradient_by_the_noise() -> None:
    given = inputs()
    given |= {"new": given["old"].clone().requires_grad_(), "mean": given["old_mean"]}
    losses, _ = call(Guard(), given)
    losses.sum().backward()
    torch.testing.assert_close(given["new"].grad, -given["advantages"] * given["noise_std"])


def test_dppo_leaves_out_what_moves_away_and_is_far() -> None:
    """k = 0.5 where the means are 1 apart at noise 1; of four pairs (r above or below 1, A of either sign) two move away."""
    new, old = torch.tensor([0.1, 0.1, -0.1, -0.1]), torch.zeros(4)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    rest: dict[str, Any] = dict(weights=torch.ones(4), mean=torch.ones(4, 3), old_mean=torch.zeros(4, 3), noise_std=torch.ones(4))
    losses, metrics = DPPO(threshold=0.5)(new, old, advantages, **rest)
    torch.testing.assert_close(losses, torch.tensor([0.0, 1.0, -1.0, 0.0]) * (new - old).exp())
    assert metrics["masked_fraction"] == 0.5 and metrics["kl_new_old"] == 0.5
    near, _ = DPPO(threshold=0.51)(new, old, advantages, **rest)
    torch.testing.assert_close(near, -advantages * new.exp())


def test_a_step_without_noise_never_leaves_the_loss() -> None:
    given = inputs() | {"noise_std": torch.zeros(8).double()}
    losses, metrics = call(DPPO(threshold=1e-9), given)
    assert (losses != 0).all() and metrics["kl_new_old"] == 0


@pytest.mark.golden
def test_dppo_equals_the_authors(golden_dir: Path) -> None:
    """UniRL's and verl-omni's losses, gradients and shares; UniRL's first step takes another sigma where it divides by it."""
    data = np.load(golden_dir / "pack" / "flow_dppo.npz", allow_pickle=False)
    meta = json.loads(str(data["meta"]))

    def tensor(name: str) -> Tensor:
        return torch.from_numpy(np.asarray(data[name]))

    seen = 0
    for case, settings in meta["cases"].items():
        kind = "kl1" if settings["add_kl_coefficient"] else "kl0"
        place = f"in.overflow_{kind}." if settings.get("overflow") else "in."
        new = tensor(f"{place}new_logp").flatten().requires_grad_()
        advantages = tensor(f"{place}advantages").flatten()
        if settings["impl"] == "unirl":
            std = tensor(f"unirl.{kind}.sigma_t").expand(tensor("in.new_logp").shape)
        else:
            std = tensor("omni.std_dev_t") * tensor("omni.sqrt_dt")
        surrogate = DPPO(threshold=settings["kl_mask_threshold"], scaled=settings["add_kl_coefficient"])
        old, weights = tensor("in.old_logp").flatten(), torch.full_like(advantages, 1 / len(advantages))
        means = {name: tensor(f"in.{name}s").flatten(0, 1) for name in ("new_mean", "old_mean")}
        losses, metrics = surrogate(
            new, old, advantages, weights=weights, mean=means["new_mean"], old_mean=means["old_mean"], noise_std=std.flatten()
        )
        if settings.get("rollout_is_weights"):
            losses = losses * tensor("in.rollout_is_weights").flatten()
        torch.testing.assert_close(losses.mean(), tensor(f"{case}.loss"), rtol=1e-9, atol=1e-12, msg=case)
        if f"{case}.grad_new_logp" in data:
            losses.mean().backward()
            torch.testing.assert_close(new.grad, tensor(f"{case}.grad_new_logp").flatten(), rtol=1e-9, atol=1e-12, msg=case)
        if f"{case}.metric.masked_fraction" in data:
            torch.testing.assert_close(metrics["masked_fraction"], tensor(f"{case}.metric.masked_fraction"), msg=case)
        seen += 1
    assert seen == len(meta["cases"]) > 0


def test_a_threshold_of_0_is_refused() -> None:
    with pytest.raises(ConfigError, match="threshold=0.0 must be above 0"):
        DPPO(threshold=0.0)
