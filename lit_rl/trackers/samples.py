"""Samples of a run on their way to the platform: what was asked and answered, drawn or played, and what it earned."""

from __future__ import annotations

import io
import json
import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lit_rl.trackers.values import line, plain

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

WIDEST, BYTES = 4096, 1 << 20
"""Pixels of a side and bytes of a picture that the platform takes."""

MOST = 64
"""Samples of a set; of more, the rest is left out."""


@dataclass(frozen=True)
class Sample:
    """A finished sample of a step. rewards: by name, NaN where there is none. source: rollout, evaluation or episodes."""

    step: int
    prompt: str
    source: str
    text: str | None = None
    group: int | None = None
    rewards: Mapping[str, float] = field(default_factory=dict)
    advantage: float | None = None
    picture: Picture | None = None

    def item(self, image: str | None) -> dict[str, object]:
        """The sample as the platform takes it, with the name of the part that has its picture."""
        text = None if self.text is None else plain(self.text)
        return {
            "step": max(self.step, 0), "prompt": plain(self.prompt), "source": self.source, "text": text, "group": self.group,
            "rewards": {line(name): _number(value) for name, value in self.rewards.items()}, "advantage": _number(self.advantage),
            "images": [] if image is None else [image],
        }  # fmt: skip


def multipart(samples: Sequence[Sample]) -> tuple[bytes, str]:
    """The body of a report of samples, and its content type. Pictures are WebP, made smaller until the platform takes them."""
    pictures = {f"image-{i}": sample.picture for i, sample in enumerate(samples[:MOST]) if sample.picture is not None}
    items = [sample.item(name if (name := f"image-{i}") in pictures else None) for i, sample in enumerate(samples[:MOST])]
    boundary = uuid.uuid4().hex
    parts = [('name="samples"', json.dumps({"items": items}).encode())]
    parts += [(f'name="{name}"; filename="{name}.webp"\r\nContent-Type: image/webp', webp(picture)) for name, picture in pictures.items()]
    body = b"".join(f"--{boundary}\r\nContent-Disposition: form-data; {head}\r\n\r\n".encode() + data + b"\r\n" for head, data in parts)
    return body + f"--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"


def webp(picture: Picture) -> bytes:
    """A picture as WebP of at most 1 MiB."""
    small, side = picture.convert("RGB"), WIDEST
    while True:
        small.thumbnail((side, side))
        file = io.BytesIO()
        small.save(file, "WEBP", quality=90)
        if file.tell() <= BYTES:
            return file.getvalue()
        side = max(small.size) // 2


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
