"""Coordinates as models write them, and the pixels of the screenshot that they mean."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from lit_rl.errors import ConfigError

Point = tuple[float, float]
"""(x, y) in pixels of the screenshot, (0, 0) at the top left."""

Space = str
"""`pixels` of the screenshot; `resized`: pixels of the picture as the model reads it (Qwen2.5-VL, UI-TARS-1.5); `norm1000`: 0 to 999 on
both axes (Qwen3-VL); `bins:N`: the number of one of N columns and rows, whose middle is meant."""


@dataclass(frozen=True)
class Screen:
    """The sizes of a screenshot in pixels, (width, height): as it was taken, and as the model reads it."""

    size: tuple[int, int]
    read: tuple[int, int]


@dataclass(frozen=True)
class Coordinates:
    """A way to write points.

    Args:
        kind: The coordinate space. bins: Number of columns and of rows of `bins`.
    """

    kind: Literal["pixels", "resized", "norm1000", "bins"]
    bins: int = 0

    @property
    def whole(self) -> bool:
        """Only whole numbers are written."""
        return True

    def extent(self, screen: Screen) -> tuple[int, int]:
        """Numbers on each axis: coordinates are 0 to one less."""
        return {"pixels": screen.size, "resized": screen.read, "norm1000": (1000, 1000), "bins": (self.bins, self.bins)}[self.kind]

    def pixels(self, x: float, y: float, screen: Screen) -> Point:
        """The point of the screenshot that (x, y) means: the middle of the square that has this number."""
        across, down = self.extent(screen)
        return (x + 0.5) * screen.size[0] / across - self._half, (y + 0.5) * screen.size[1] / down - self._half

    def written(self, point: Point, screen: Screen) -> tuple[int, int]:
        """The whole numbers that name a point of the screenshot; `pixels` of them is the nearest point that has a name."""
        across, down = self.extent(screen)
        x, y = ((v + self._half) * n / size for v, n, size in zip(point, (across, down), screen.size, strict=True))
        return min(max(int(x), 0), across - 1), min(max(int(y), 0), down - 1)

    @property
    def _half(self) -> float:
        """A pixel is named by its own place, which is the middle of it."""
        return 0.5 if self.kind == "pixels" else 0.0


def coordinates(space: Space) -> Coordinates:
    """The coordinates that a name says, see `Space`. Raises ConfigError for a name that there is not."""
    if space in ("pixels", "resized", "norm1000"):
        return Coordinates(space)  # type: ignore[arg-type]  # mypy does not narrow strings
    if (found := re.fullmatch(r"bins:(\d+)", space)) and int(found[1]) > 0:
        return Coordinates("bins", int(found[1]))
    raise ConfigError(f"codec.space={space!r} is no coordinate space: choose pixels, resized, norm1000, or bins:N such as bins:8")
