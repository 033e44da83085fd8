"""Metrics as people log them, as plain numbers by flat names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import SupportsFloat


def flat_numbers(metrics: Mapping[str, object], prefix: str = "") -> dict[str, float]:
    """Numbers by name; nested mappings are joined by "/". Tensors of one element are numbers, too; texts are left out."""
    found: dict[str, float] = {}
    for key, value in metrics.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            found |= flat_numbers(value, f"{name}/")
        elif not isinstance(value, str) and isinstance(value, SupportsFloat):
            try:
                found[name] = float(value)
            except (TypeError, ValueError, RuntimeError):  # a tensor of several elements
                continue
    return found


def as_json(numbers: Mapping[str, float]) -> dict[str, float | None]:
    """The numbers; None for what JSON does not have."""
    return {key: value if math.isfinite(value) else None for key, value in numbers.items()}
