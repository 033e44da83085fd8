"""From bytes that a stranger sent to pixels: everything is checked in the header, before anything is decoded."""

from __future__ import annotations

import base64
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lit_rl.rewards.service.samples import SampleError

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_ASPECT = 64
"""Longer side over shorter side of an image that is scored. A reader of text scales a line to a fixed height: one of 1 x 3000 pixels
becomes 144,000 wide and costs gigabytes."""
MAX_SCANS = 64
"""Scans of a progressive JPEG; encoders write about ten. Each costs a pass over all pixels, and an empty one takes a few bytes."""


def pixel_error(height: int, width: int, *, max_pixels: int) -> SampleError | None:
    """The reason not to score an image of this size, if there is one."""
    if height * width > max_pixels:
        return SampleError("too_many_pixels", f"the image is {width} x {height}; at most {max_pixels} pixels are scored (--max-pixels)")
    if max(height, width) > MAX_ASPECT * min(height, width):
        return SampleError("too_thin", f"the image is {width} x {height}; one side may be at most {MAX_ASPECT} times the other")
    return None


def mask_problem(mask: Any, height: int, width: int) -> str | None:
    """The problem of a mask for an image of this size, or None."""
    shape = tuple(getattr(mask, "shape", ()))
    if shape != (height, width):
        return f"is {list(shape) or type(mask).__name__}, its image {[height, width]} (height, width); they must be equal"
    return None if (mask > 0).any() else "is all zero; it must be above 0 where the text is"


def decode_base64(text: str) -> bytes:
    """Base64, in lines or not, with or without a `data:...;base64,` prefix."""
    if text.lstrip()[:5].lower() == "data:":
        text = text.partition(",")[2]
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError as error:
        raise SampleError("bad_image", f"`image` is not base64: {error}") from error


def lossy(image: Picture, data: bytes | None = None) -> bool:
    """True when an open Pillow image comes from a file in which black is not exactly black around an edge. data: the file's bytes."""
    if image.format == "WEBP":
        head = Path(getattr(image, "filename", "")).read_bytes() if data is None else data
        return b"VP8L" not in head[:64]  # behind VP8X and a profile it would be farther; such a file counts as lossy
    if image.format == "TIFF":
        return image.info.get("compression") in ("jpeg", "tiff_jpeg", "webp")
    return image.format in ("JPEG", "MPO", "JPEG2000", "AVIF", "HEIF")


def decode_mask(data: bytes, *, max_pixels: int) -> np.ndarray:
    """As `decode_image`, to uint8 [H, W]: 255 where the mask is neither black nor transparent, in lossy files where it is half white."""
    from PIL import Image

    pixels = decode_image(data, max_pixels=max_pixels, under="black").max(-1)
    with Image.open(BytesIO(data), formats=FORMATS) as image:
        least = 128 if lossy(image, data) else 1
    return np.where(pixels >= least, 255, 0).astype(np.uint8)


def decode_image(data: bytes, *, max_pixels: int, under: str = "white") -> np.ndarray:
    """PNG, JPEG or WebP of one frame with 8 bits per channel -> RGB uint8 [H, W, 3], upright as its EXIF says; transparency is laid over
    the colour `under`.

    Raises SampleError. The size is read from the header first: 20 kB of PNG can claim 13000 x 13000 pixels, for which Pillow only warns
    while it allocates 800 MB.
    """
    from PIL import Image, ImageOps

    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise SampleError("too_many_pixels", str(error)) from error
    except Exception as error:  # hostile files make Pillow raise nearly anything
        raise SampleError("bad_image", f"not a {', '.join(FORMATS)} image") from error
    with image:
        if (too_large := pixel_error(image.height, image.width, max_pixels=max_pixels)) is not None:
            raise too_large
        if image.format == "JPEG" and data.count(b"\xff\xda") > MAX_SCANS:
            raise SampleError("bad_image", f"the JPEG has more than {MAX_SCANS} scans; encode it again")
        if getattr(image, "n_frames", 1) != 1:
            raise SampleError("bad_image", "the image is animated; send one frame")
        if image.mode not in ("RGB", "RGBA", "L", "LA") or (image.format == "PNG" and data[24:25] != b"\x08"):
            raise SampleError("bad_image", f"the image has mode {image.mode}; 8 bits per channel RGB, RGBA or grey are taken")
        try:
            image.load()
            upright = ImageOps.exif_transpose(image)
        except Exception as error:
            raise SampleError("bad_image", f"the image cannot be decoded: {str(error)[:120]}") from error
        if image.mode in ("RGBA", "LA"):
            rgba = upright.convert("RGBA")
            return np.asarray(Image.alpha_composite(Image.new("RGBA", rgba.size, under), rgba).convert("RGB"))
        return np.asarray(upright.convert("RGB"))
