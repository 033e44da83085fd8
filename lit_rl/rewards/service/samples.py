"""The samples that a reward server scores: images and texts, and the reason where it does not score one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias

import numpy as np

Sample: TypeAlias = np.ndarray | str
"""An RGB image uint8 [H, W, 3], or a text."""

Medium: TypeAlias = Literal["images", "texts"]

Row: TypeAlias = Mapping[str, object]
"""The scores of one sample (float, NaN = could not be computed), and texts worth showing beside them."""


class SampleError(ValueError):
    """A sample that will not be scored. `code` is for programs, the text for people."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def medium_of(sample: Sample) -> Medium:
    """The kind of a sample, which decides the rewards that can score it."""
    return "texts" if isinstance(sample, str) else "images"
