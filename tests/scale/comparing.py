"""Readers and comparisons of the files that scale tests write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SHARDED = ["fsdp2", "fsdp2-file", "zero1", "zero2", "zero3"]
SPLIT_WEIGHTS = ["fsdp2", "fsdp2-file", "zero3", "zero3-offload"]
LORA: dict[str, Any] = {"lora": {"rank": 4, "alpha": 8.0, "init": "default"}, "keep_reference": True, "gradient_checkpointing": True}
FULL: dict[str, Any] = {"keep_reference": True, "gradient_checkpointing": True}

Alone = Callable[..., tuple[Path, Any]]
"""The fixture `alone`."""
Written = Callable[[str], Path]
"""The fixture `written`."""
AT = "epoch=1-step=3.ckpt"
"""A checkpoint of it, inside its only iteration; `epoch=0-step=2.ckpt` is of the end of the warm-up."""


def ended(folder: Path) -> dict[str, Any]:
    """The end of a run, as `scenarios.fit` wrote it."""
    return torch.load(folder / "end.pt", weights_only=True)


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest difference of any weight."""
    assert a.keys() == b.keys() and a
    return max(float((a[name].detach().double() - b[name].detach().double()).abs().max()) for name in a)


def identical(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Bit for bit: weights, average, prompt statistics and the score of the held-out prompts."""
    tensors = all(torch.equal(a[kind][name], b[kind][name]) for kind in ("weights", "average") for name in a[kind])
    return tensors and a["average"].keys() == b["average"].keys() and all(a[k] == b[k] for k in ("tracker", "validated"))
