"""Does the image show the text that the prompt asks for?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lit_rl.errors import ConfigError
from lit_rl.rewards.base import Reward
from lit_rl.rewards.lettering import How, fold, normalize, similarity
from lit_rl.rewards.masks import look_through, mask_of
from lit_rl.rewards.ocr_engine import Reading, alphabet, line_reader, scene_reader
from lit_rl.rewards.quotes import SHOWN, check_targets, find_target
from lit_rl.types import Info

__all__ = ["OCRReward", "Reading", "find_target", "normalize", "similarity", "trim"]

LINE_HEIGHT = 32
"""Pixels of the shorter side below which `detect: auto` takes a picture, or what a mask shows of it, as one line."""


def trim(image: np.ndarray, *, threshold: int = 48, margin: int = 2) -> np.ndarray:
    """The box around all pixels that differ from the median colour by more than `threshold`, plus a margin; everything if none do."""
    differs = (np.abs(image.astype(np.int16) - np.median(image.reshape(-1, 3), axis=0)) > threshold).any(-1)
    rows, cols = np.flatnonzero(differs.any(1)), np.flatnonzero(differs.any(0))
    if not len(rows):
        return image
    return image[max(0, rows[0] - margin) : rows[-1] + 1 + margin, max(0, cols[0] - margin) : cols[-1] + 1 + margin]


class OCRReward(Reward):
    """`ocr_similarity` (NaN when the prompt names no text, or one that the engine lacks most letters for) and `ocr_confidence`, in [0, 1].

    Args:
        detect: `true` finds the lines of text first and reads them from top to bottom and from left to right, as pictures need it.
            `false` reads the whole as one line, twenty times as fast: for miniatures, and for masks that hold one line. `auto` is `false`
            for what is less than 32 pixels high or wide, `true` otherwise.
        trim: where nothing is detected, crop to the ink before reading; small letters on a large canvas are lost otherwise.
        compare: `compact` ignores case and white space, `exact` does not; see `lettering.fold` for what neither distinguishes.
        anywhere: a reading that contains the target counts as exact.
        detect_side: shorter side in pixels to which detection enlarges an image.
        threads: of ONNX Runtime. One per process is the fastest choice beside a training run.

    With `info["mask"]`, Tensor or array "H W", only the part of the image where it is above 0 is read; what stands elsewhere does not
    count. Images are read one by one, so a score does not depend on its batch.
    """

    outputs = ("ocr_similarity", "ocr_confidence")
    highest = MappingProxyType({"ocr_similarity": 1.0})

    def __init__(
        self,
        *,
        detect: bool | Literal["auto"] = "auto",
        trim: bool = True,
        compare: How = "compact",
        anywhere: bool = False,
        detect_side: int = 512,
        threads: int = 1,
    ) -> None:
        if compare not in ("compact", "exact"):
            raise ConfigError(f"compare={compare!r}; choose `compact` or `exact`")
        if not isinstance(detect, bool) and detect != "auto":
            raise ConfigError(f"detect={detect!r}; choose true, false or `auto`")
        self.detect: bool | Literal["auto"] = detect
        self.trim = trim
        self.compare: How = compare
        self.anywhere = anywhere
        self.detect_side = detect_side
        self.threads = threads
        self._line: Callable[[np.ndarray], Reading] | None = None
        self._scene: Callable[[np.ndarray], Reading] | None = None

    def check(self, rows: Iterable[Info]) -> None:
        """Raises ConfigError for prompts whose wanted text is not told, or in a script that is not read."""
        check_targets(rows := list(rows))
        unread = [row for row in rows if not _can_read(str(find_target(row)))]
        if unread:
            shown = [f"{row.get('where') or row.get('id') or 'prompt'}: {find_target(row)!r}" for row in unread[:SHOWN]]
            raise ConfigError(
                "\n  ".join(
                    [f"{len(unread)} of {len(rows)} wanted texts are in a script that PP-OCRv6 does not read; leave them out", *shown]
                )
            )

    def setup(self, *, rank: int = 0, world_size: int = 1, device: str = "cpu") -> None:
        """Load the engine."""
        if self.detect is not True and self._line is None:
            self._line = line_reader(self.threads)
        if self.detect is not False and self._scene is None:
            self._scene = scene_reader(self.detect_side, self.threads)

    def read(self, images: Sequence[np.ndarray]) -> list[Reading]:
        """RGB images uint8 [H, W, 3] of any sizes -> text and confidence of each."""
        self.setup()
        return [self._read(image) for image in images]

    def _read(self, image: np.ndarray) -> Reading:
        if self._scene is not None and (self._line is None or min(image.shape[:2]) >= LINE_HEIGHT):
            return self._scene(image)
        assert self._line is not None
        return self._line(trim(image) if self.trim else image)

    def grade(self, readings: Sequence[Reading], info: Sequence[Info]) -> dict[str, Tensor]:
        """Compare what was read with what each prompt asks for."""
        similar = [
            similarity(text, target, how=self.compare, anywhere=self.anywhere)
            if (target := find_target(row)) is not None and _can_read(target)
            else float("nan")
            for (text, _), row in zip(readings, info, strict=True)
        ]
        return {"ocr_similarity": torch.tensor(similar), "ocr_confidence": torch.tensor([conf for _, conf in readings])}

    def score(self, media: Tensor, info: Sequence[Info]) -> Mapping[str, Tensor]:
        """Confidence and similarity of the text that is read in each image."""
        return self.explain(media, info)[0]

    def explain(self, media: Tensor, info: Sequence[Info]) -> tuple[Mapping[str, Tensor], Mapping[str, Sequence[str]]]:
        """The scores, and the text that was read."""
        images = media.permute(0, 2, 3, 1).cpu().numpy()
        readings = self.read([_visible(image, row) for image, row in zip(images, info, strict=True)])
        return self.grade(readings, info), {"ocr_text": [text for text, _ in readings]}


def _can_read(text: str) -> bool:
    """True if the engine knows at least half of its characters: in a script that it does not read it still knows stops and digits."""
    characters = fold(text).replace(" ", "")
    return 2 * sum(c in alphabet() for c in characters) >= len(characters)


def _visible(image: np.ndarray, info: Info) -> np.ndarray:
    mask = mask_of(info, *image.shape[:2])
    return image if mask is None else look_through(image, mask)
