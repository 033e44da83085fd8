"""Image files as pixels: upright, opaque, of 8 bits, or a sentence on what is wrong with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_rl.errors import ConfigError
from lit_rl.rewards.service.images import lossy
from lit_rl.types import Size

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

Box = tuple[int, int, int, int]
"""(left, top, right, bottom) in pixels, right and bottom outside, as Pillow has it."""


def read_picture(file: Path | bytes, size: Size | None, box: Box | None, longest: int | None, *, where: str) -> Tensor:
    """An image file, or what is in one -> RGB uint8 "3 H W", turned upright as its EXIF says, transparency over white, deep grey as 8 bits.

    box: cut this out first. size: then stretch to it. longest: or scale down to so many pixels of the longer side.
    """
    from PIL import Image

    with _opened(file, where) as image:
        image = _opaque(_upright(image), "white").convert("RGB")
        if box is not None:
            image = image.crop(box)
        if size is not None and image.size != size[::-1]:
            image = image.resize(size[::-1], Image.Resampling.BICUBIC)
        if longest is not None:
            image.thumbnail((longest, longest))
        return _pixels(image).permute(2, 0, 1).contiguous()


def read_mask(path: Path, size: Size, *, where: str) -> Tensor:
    """A mask file -> uint8 "H W": 255 where `white_of` says so, 0 elsewhere; resized to the nearest pixel."""
    from PIL import Image

    with _opened(path, where) as image:
        return _pixels(white_of(image).resize(size[::-1], Image.Resampling.NEAREST))


def white_of(mask: Picture) -> Picture:
    """The mask in an open Pillow image, upright: "L", 255 wherever it is neither black nor transparent, 0 elsewhere.

    Black in a lossy file (JPEG, JPEG 2000, WebP) is not exactly black around an edge: there from half white on.
    """
    import numpy as np
    from PIL import Image

    least = 128 if lossy(mask) else 1
    if _deep(mask):
        values = np.nan_to_num(np.asarray(_upright(mask), dtype=np.float64))
        return Image.fromarray(np.where(values >= values.max() / 2 if least > 1 else values != 0, 255, 0).astype(np.uint8))
    brightest = np.asarray(_opaque(_upright(mask), "black").convert("RGB")).max(-1)  # as grey, pure blue would be nearly black
    return Image.fromarray(np.where(brightest >= least, 255, 0).astype(np.uint8))


def header_size(file: Path | BytesIO) -> Size | str:
    """The size of an image file from its header, or what is wrong with it."""
    from PIL import Image

    if isinstance(file, Path) and not file.is_file():
        return f"no such file {file}"
    try:
        with Image.open(file) as image:
            check_frames(image)
            return size_of(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return f"{file if isinstance(file, Path) else 'it'} is not an image that can be read ({error})"


def picture_bytes(image: Picture) -> bytes:
    """An image of Pillow as what a PNG file holds."""
    buffer = BytesIO()
    _upright(image).save(buffer, "PNG")
    return buffer.getvalue()


def size_of(image: Picture) -> Size:
    """(height, width) of an open Pillow image as it is looked at. Reads no more than its header."""
    width, height = image.size
    return (width, height) if _orientation(image) >= 5 else (height, width)


def _orientation(image: Picture) -> int:
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # Pillow would decode the whole file to look behind the pixels
    return int(image.getexif().get(0x0112, 1))


@contextmanager
def _opened(file: Path | bytes, where: str) -> Iterator[Picture]:
    """The decoded image. Raises ConfigError for one that cannot be decoded, or not be turned into what is made of it."""
    from PIL import Image

    try:
        with Image.open(BytesIO(file) if isinstance(file, bytes) else file) as image:
            check_frames(image)
            image.load()
            yield image
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow's words for a broken file
        name = file if isinstance(file, Path) else "an image of bytes"
        raise ConfigError(f"{where}: {name} cannot be read ({error}); write the image again or take the item out") from error


def check_frames(image: Picture) -> None:
    """Raise ValueError for an open Pillow image that is several pictures."""
    if getattr(image, "is_animated", False) and image.format not in ("MPO", "PSD"):  # a photo with a preview; layers
        raise ValueError(f"it holds {getattr(image, 'n_frames', 'several')} frames; save the one that is meant")


def _upright(image: Picture) -> Picture:
    from PIL import ImageOps

    return ImageOps.exif_transpose(image) if _orientation(image) > 1 else image


def _opaque(image: Picture, background: str) -> Picture:
    """8 bits per channel, with what is transparent laid over `background`."""
    from PIL import Image

    if _deep(image):
        return _eight_bits(image)
    if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
        return image
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, background), rgba)


def _deep(image: Picture) -> bool:
    """True for grey images of more than 8 bits: Pillow's own conversion would cut off all that is above 255."""
    return image.mode == "F" or image.mode.startswith("I")


def _eight_bits(image: Picture) -> Picture:
    """A deep image as "L". White is 65535 in 16 bits; in floats and 32 bits the least of 1 (floats), 255, 65535 and 2^32 - 1 above all.

    Raises ValueError where the brightest value is less than a quarter of 65535: scans of 10 to 14 bits are kept so, and would become dark.
    """
    import numpy as np
    from PIL import Image

    short, peak = image.mode.startswith("I;16"), image.getextrema()[1]  # one channel, so a number
    if isinstance(peak, int | float) and (0 if short else 255) < peak < 1 << 14:
        raise ValueError(f"its brightest value is {peak:g} of 65535, as scans of 10 to 14 bits have it; save it with 8 bits")
    if short:
        return image.point(lambda value: value / 257 + 0.5).convert("L")
    values = np.asarray(image, dtype=np.float64)
    if not np.isfinite(values).all() or values.min() < 0 or values.max() >= 2**32:
        raise ValueError(f"its values reach from {values.min():g} to {values.max():g}; save it with 8 or 16 bits")
    tops = [1.0] * (image.mode == "F") + [255.0, 65535.0, 2**32 - 1.0]
    top = next(top for top in tops if values.max() <= top)
    return Image.fromarray(np.rint(values * (255 / top)).astype(np.uint8))


def _pixels(image: Picture) -> Tensor:
    import numpy as np

    return torch.from_numpy(np.array(image))
