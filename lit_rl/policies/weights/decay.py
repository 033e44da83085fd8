"""Decays of moving averages of weights (EMA, old policy) as functions of the step, and the update they go into.

copy <- d copy + (1 - d) new: 0 copies, 1 freezes. Step counts optimizer steps from 0.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def ema_update(ema: Tensor, new: Tensor, *, decay: float) -> Tensor:
    """d ema + (1 - d) new; exactly `new` at d = 0 and exactly `ema` at d = 1."""
    return torch.lerp(ema, new, 1 - decay)


def ema_is_due(step: int, *, interval: int) -> bool:
    """(step + 1) % interval == 0: whether the average takes in the weights after optimizer step `step`, counted from 0."""
    return (step + 1) % interval == 0


def ema_decay(step: int, *, decay: float, warmup_steps: int = 10) -> float:
    """min((1 + s) / (warmup_steps + s), decay): short memory at first (Flow-GRPO, DiffusionNFT: warmup_steps 10, decay 0.9)."""
    return min((1 + step) / max(warmup_steps + step, 1), decay)


def ramp_decay(step: int, *, start: float = 0, value: float = 0.0, slope: float = 0.0, end: float = 0.0) -> float:
    """`value` before step `start`, then min(value + slope (step - start), end)."""
    return value if step < start else min(value + (step - start) * slope, end)


OldPolicyDecay = Literal["copy", "slow", "late", "frozen", "fast", "moderate", "steep"]

OLD_POLICY_DECAYS: dict[OldPolicyDecay, dict[str, float]] = {
    "copy": {},  # DiffusionNFT type 0
    "slow": {"slope": 0.001, "end": 0.5},  # type 1
    "late": {"start": 75, "slope": 0.0075, "end": 0.999},  # type 2: on-policy for 75 steps, then nearly frozen from step 208 on
    "frozen": {"value": 1.0, "end": 1.0},
    "fast": {"slope": 0.02, "end": 0.99},
    "moderate": {"slope": 0.01, "end": 0.5},
    "steep": {"slope": 0.0075, "end": 0.999},
}
"""Arguments of `ramp_decay` by name: DiffusionNFT's decay types (arXiv 2509.16117) and, in this order, CRD's presets 0 ... 6."""


DECAY_TYPES: dict[int, OldPolicyDecay] = {0: "frozen", 1: "slow", 2: "late"}
"""`nft_decay_type` of the FLUX-Fill trainer as its guide describes it. DiffusionNFT's own type 0 is "copy"."""
