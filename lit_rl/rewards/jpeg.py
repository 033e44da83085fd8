"""Size of the image as a JPEG: the cheapest reward with a visible effect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO

import torch
from torch import Tensor

from lit_rl.rewards.base import Reward
from lit_rl.types import Info


class JPEGSizeReward(Reward):
    """`jpeg_size` = scale * size in kB of the JPEG at the given quality (DDPO, arXiv 2305.13301, section 5.1).

    Args:
        scale: The default rewards compressible images as Flow-GRPO scales it; 1.0 is DDPO's incompressibility.
        quality: Of the JPEG, 1 to 95.
    """

    outputs = ("jpeg_size",)

    def __init__(self, *, scale: float = -1 / 500, quality: int = 95) -> None:
        if not 1 <= quality <= 95:
            raise ValueError(f"quality={quality}; JPEG quality is between 1 and 95")
        self.scale = scale
        self.quality = quality

    def score(self, media: Tensor, info: Sequence[Info]) -> Mapping[str, Tensor]:
        """Encode each image and take the size of the file."""
        sizes = [self._kilobytes(image) for image in media.permute(0, 2, 3, 1).cpu()]
        return {"jpeg_size": torch.tensor(sizes) * self.scale}

    def _kilobytes(self, image: Tensor) -> float:
        from PIL import Image

        file = BytesIO()
        Image.fromarray(image.contiguous().numpy()).save(file, format="JPEG", quality=self.quality)
        return file.tell() / 1000
