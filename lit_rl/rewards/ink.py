"""Is the text written in the ink of the reference image? The simplest measure of a style."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from lit_rl.rewards.base import Reward
from lit_rl.rewards.masks import mask_of
from lit_rl.types import Info


def ink_colour(pixels: np.ndarray, *, contrast: float = 48.0) -> np.ndarray | None:
    """Mean colour of those of the pixels uint8 [N, 3] that are at least half as far from the paper (the median) as the farthest one.

    None where nothing differs from the paper by `contrast`, a distance in RGB.
    """
    distance = np.linalg.norm(pixels - np.median(pixels, axis=0), axis=1)
    return pixels[2 * distance >= distance.max()].mean(0) if distance.max() >= contrast else None


class InkReward(Reward):
    """`ink_similarity` = max(0, 1 - |ink - ink of `info["reference"]`| / 255), distances in RGB; 0 without any ink.

    With `info["mask"]` only the ink where it is above 0 counts. NaN when the reference shows no ink.
    """

    outputs = ("ink_similarity",)
    highest = MappingProxyType({"ink_similarity": 1.0})

    def score(self, media: Tensor, info: Sequence[Info]) -> Mapping[str, Tensor]:
        """Likeness of the ink in each image to that of its reference: 0 without ink in the image, NaN without ink in the reference."""
        images = media.permute(0, 2, 3, 1).cpu().numpy()
        return {"ink_similarity": torch.tensor([_similarity(image, row) for image, row in zip(images, info, strict=True)])}


def _similarity(image: np.ndarray, row: Info) -> float:
    wanted = ink_colour(row["reference"].flatten(1).T.cpu().numpy())
    if wanted is None:
        return float("nan")
    mask = mask_of(row, *image.shape[:2])
    ink = ink_colour(image.reshape(-1, 3) if mask is None else image[mask > 0])
    return 0.0 if ink is None else max(0.0, 1 - float(np.linalg.norm(ink - wanted)) / 255)
