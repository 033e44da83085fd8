"""Metrics as people log them, as plain numbers by flat names."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import SupportsFloat

LONGEST = 20_000
"""Characters of a text that the platform takes."""


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
    """Returns the numbers as the platform takes them: under names of one line; None stands for what JSON does not have."""
    return {line(key) or "_": value if math.isfinite(value) else None for key, value in numbers.items()}


def line(text: str) -> str:
    """Returns a text as one line of at most 200 characters, which the platform takes as a name."""
    return plain(re.sub(r"[\x00-\x1f\x7f]+", " ", text), 200)


def plain(text: str, longest: int = LONGEST) -> str:
    """Returns a text as JSON and databases take it: cut, without NUL and halves of characters."""
    return text.replace("\0", "")[:longest].encode("utf-8", "replace").decode()
