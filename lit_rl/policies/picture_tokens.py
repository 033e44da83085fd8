"""Pictures as Qwen's vision towers read them: resized to whole patches, and how many tokens of a prompt stand for each."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lit_rl.errors import ConfigError
from lit_rl.types import Size

if TYPE_CHECKING:
    from transformers.image_utils import SizeDict
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil


SETTLES = 16
"""Times that a picture is resized at most until its size stays."""


class PictureProcessor:
    """The image processor of a folder or hub repository, transformers' own one without torchvision. It is read when first asked for.

    Args:
        pretrained: Folder or hub id with a preprocessor_config.json.
        revision: Of a hub repository.
        min_pixels: Smaller pictures are scaled up; None = as the folder says.
        max_pixels: Larger pictures are scaled down; None = as the folder says.
    """

    def __init__(
        self, pretrained: str, *, revision: str | None = None, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> None:
        for name, value in {"min_pixels": min_pixels, "max_pixels": max_pixels}.items():
            if value is not None and value < 1:
                raise ConfigError(f"model.policy.{name}={value} must be at least 1")
        self.pretrained, self.revision = pretrained, revision
        self.limits = {"shortest_edge": min_pixels, "longest_edge": max_pixels}

    @cached_property
    def stock(self) -> Qwen2VLImageProcessorPil:
        """Raises ConfigError where the folder has no settings of an image processor."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        try:
            found = Qwen2VLImageProcessorPil.from_pretrained(self.pretrained, revision=self.revision or "main")
        except OSError as error:
            raise ConfigError(
                f"pretrained: {self.pretrained!r} has no preprocessor_config.json, which says how pictures are resized: take it from the "
                f"model's own repository ({error})"
            ) from error
        return found

    @cached_property
    def pixels(self) -> SizeDict:
        """Pixels of a picture at least and at most. Raises ConfigError where no size is left."""
        from transformers.image_utils import SizeDict

        least, most = (given or dict(self.stock.size)[name] for name, given in self.limits.items())
        if least > most:
            raise ConfigError(f"model.policy.min_pixels={least} is more than max_pixels={most}: raise max_pixels")
        return SizeDict(shortest_edge=least, longest_edge=most)

    @property
    def cell(self) -> int:
        """Pixels on a side of what becomes one token."""
        return int(self.stock.patch_size * self.stock.merge_size)

    def resized_size(self, size: Size) -> Size:
        """The size at which a picture is read. Raises ConfigError for strips more than 200 times as long as wide.

        It is one that stays when a server resizes the resized picture, also where a strip is larger than `max_pixels` after its first time.
        Limits so near each other that there is none leave it at that of the first time.
        """
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        least, most = self.pixels.shortest_edge, self.pixels.longest_edge
        assert least is not None and most is not None
        found = [size]
        try:
            while len(found) < 2 or found[-1] != found[-2]:
                found.append(smart_resize(*found[-1], self.cell, min_pixels=least, max_pixels=most))
                if len(found) > SETTLES:
                    return found[1]
        except ValueError as error:
            raise ConfigError(
                f"a picture of {size[1]} x {size[0]} pixels (width x height) cannot be read: {error}; crop it, or take the row out"
            ) from error
        return found[-1]

    def tokens(self, size: Size) -> int:
        """Tokens of a prompt that stand for a picture of this size, before it is resized."""
        return self.pieces(self.resized_size(size))

    def pieces(self, size: Size) -> int:
        """Tokens that stand for a resized picture of this size."""
        return (size[0] // self.cell) * (size[1] // self.cell)

    def resized(self, picture: Tensor) -> Tensor:
        """uint8 "3 H W" at the size at which it is read."""
        from transformers.image_processing_backends import PilBackend
        from transformers.image_utils import SizeDict

        height, width = self.resized_size((picture.shape[1], picture.shape[2]))
        if tuple(picture.shape[1:]) == (height, width):
            return picture
        found = PilBackend.resize(self.stock, picture.numpy(), SizeDict(height=height, width=width), self.stock.resample)
        return torch.from_numpy(np.ascontiguousarray(found))

    def patches(self, pictures: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Patches Float32 "P C" of resized pictures, and their grid Int "N 3" (frames, rows and columns of patches)."""
        found = self.stock(images=[picture.cpu() for picture in pictures], do_resize=False, return_tensors="pt")
        return found["pixel_values"], found["image_grid_thw"]
