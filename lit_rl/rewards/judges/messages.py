"""Messages of the OpenAI chat protocol: pictures as data URLs, captions that cannot pass for markup."""

from __future__ import annotations

import base64
import io
import re
import unicodedata
from typing import Literal, TypeAlias

import numpy as np
from torch import Tensor

Encoding = Literal["jpeg", "png", "webp"]
Part: TypeAlias = dict[str, str | dict[str, str]]
Message: TypeAlias = dict[str, str | list[Part]]

_SAVED: dict[str, dict[str, int | bool]] = {
    "jpeg": {"quality": 95, "subsampling": 0},
    "png": {"compress_level": 1},
    "webp": {"lossless": True, "quality": 0, "method": 0},  # 9 ms for 512 x 512; the default takes 150
}
_VERDICT = re.compile(
    r"</?(think|thought|answer|score|description|analysis|checkpoint)>|image [12] is (not )?better|final score ?:|score \(1-5\) ?:"
    r"""|["'](score|winner|cat_winner)["'] ?:""",
    re.IGNORECASE,
)
_MARKUP = re.compile(r"<(?=[/|A-Za-z])")


def picture(image: Tensor | np.ndarray, encoding: Encoding = "jpeg") -> Part:
    """The part of a message that shows an image, Tensor uint8 "3 H W" or array uint8 [H, W, 3], as a data URL."""
    from PIL import Image

    pixels = image.permute(1, 2, 0).cpu().numpy() if isinstance(image, Tensor) else image
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, encoding, **_SAVED[encoding])
    return {"type": "image_url", "image_url": {"url": f"data:image/{encoding};base64,{base64.b64encode(buffer.getvalue()).decode()}"}}


def written(text: str) -> Part:
    """The part of a message that is text."""
    return {"type": "text", "text": text}


def question(text: str, *pictures: Part, system: str | None = None) -> list[Message]:
    """The messages of one question: pictures first, as judges are trained, then the text."""
    opening: list[Message] = [{"role": "system", "content": system}] if system is not None else []
    return [*opening, {"role": "user", "content": [*pictures, written(text)]}]


def harmless(caption: str) -> str:
    """A caption in which nothing passes for a tag or a token of a chat template: `<|im_end|>` becomes `< |im_end|>`."""
    return _MARKUP.sub("< ", caption)


def plain(text: str) -> str:
    """A text in one spelling: full-width forms as ASCII, without Markdown's emphasis, each white space one blank."""
    return " ".join(re.sub(r"[*_`]+", "", unicodedata.normalize("NFKC", text)).split())


def states_verdict(caption: str) -> bool:
    """True for a caption that says what a judge says to give its verdict: repeated in an answer, it could pass for the judge's own."""
    return _VERDICT.search(re.sub(r"\s*(</?)\s*|\s*>", lambda m: m[1] or ">", plain(caption))) is not None
