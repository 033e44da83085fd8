"""A miniature DeepGen on disk, and policies of it. For tests of everything but the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_rl.miniatures.deepgen import build_deepgen
from lit_rl.policies.deepgen import DeepGenPolicy
from lit_rl.policies.weights.lora import LoraSettings

HEIGHT, WIDTH = 16, 24


def build(folder: Path, **sizes: Any) -> Path:
    return build_deepgen(folder, **{"height": HEIGHT, "width": WIDTH, "hidden": 32, "connector_hidden": 24} | sizes)


def deepgen_policy(
    folder: Path, *, lora: dict[str, Any] | None = None, train: Sequence[Any] | None = None, **changes: Any
) -> DeepGenPolicy:
    settings: dict[str, Any] = {
        "pretrained": str(folder / "sd3"),
        "language_model": str(folder / "language"),
        "checkpoint": str(folder / "checkpoint.pth"),
        "adapter": LoraSettings(rank=4, alpha=8.0),
        "lora": LoraSettings(**lora) if lora else None,
        "connector_heads": 2,
        "resolution": (HEIGHT, WIDTH),
    }
    return DeepGenPolicy(**settings | changes, train=train)
