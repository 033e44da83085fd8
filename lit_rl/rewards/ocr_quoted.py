"""DeepGen-RL's OCR reward: the picture's lines against the first, or against all, of the texts that the prompt quotes."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lit_rl.errors import ConfigError
from lit_rl.rewards.base import Reward
from lit_rl.rewards.ocr_engine import Reading, lines_reader
from lit_rl.rewards.quoted_text import AllQuoted, check_quoted, first_quoted
from lit_rl.types import Info

VARIABLE = "OCR_SCORER_IMPL"


class QuotedTextReward(Reward[Tensor]):
    """`ocr` in [0, 1]; NaN for a prompt without a text between straight double quotes, and for a picture that the engine fails on.

    Args:
        scorer: `old` looks for the first quoted text anywhere in what was read, without case and spaces; `new` for each of them
            (`lit_rl.rewards.quoted_text`). Default: $OCR_SCORER_IMPL, else `old`.
        settings: Of `new`. Default: $OCR_MIN_CONF, $OCR_NGRAM_MAX, $OCR_CASE_SENSITIVE, $OCR_IGNORE_PUNCT, $OCR_USE_CONFUSION_FOLD.
        detect_side: Shorter side in pixels to which pictures are enlarged before lines are looked for.
        threads: Of ONNX Runtime.
    """

    outputs = ("ocr",)
    highest = MappingProxyType({"ocr": 1.0})

    def __init__(
        self,
        *,
        scorer: Literal["old", "new"] | None = None,
        settings: AllQuoted | None = None,
        detect_side: int = 512,
        threads: int = 1,
    ) -> None:
        name = scorer or os.environ.get(VARIABLE, "").strip() or "old"
        if name not in ("old", "new"):
            raise ConfigError(f"scorer={name!r} (or {VARIABLE} in the environment) must be `old` or `new`")
        self.grade = first_quoted if name == "old" else settings or AllQuoted.from_environment()
        self.detect_side, self.threads = detect_side, threads
        self._read: Callable[[np.ndarray], list[Reading]] | None = None

    def check(self, rows: Iterable[Info]) -> None:
        """Raises ConfigError that names prompts without a text to look for."""
        check_quoted(rows, self.grade)

    def setup(self, *, rank: int = 0, world_size: int = 1, device: str = "cpu") -> None:
        """Load the engine."""
        if self._read is None:
            self._read = lines_reader(self.detect_side, self.threads)

    def score(self, media: Tensor, info: Sequence[Info]) -> Mapping[str, Tensor]:
        """One score for each picture."""
        return self.explain(media, info)[0]

    def explain(self, media: Tensor, info: Sequence[Info]) -> tuple[Mapping[str, Tensor], Mapping[str, Sequence[str]]]:
        """The scores, and the lines that were read."""
        lines = [self._lines(image) for image in media.permute(0, 2, 3, 1).cpu().numpy()]
        scores = [math.nan if read is None else self.grade(str(row["prompt"]), read) for read, row in zip(lines, info, strict=True)]
        return {"ocr": torch.tensor(scores, dtype=torch.float64)}, {"ocr_text": ["\n".join(t for t, _ in read or []) for read in lines]}

    def _lines(self, image: np.ndarray) -> list[Reading] | None:
        """The lines of a picture, None where the engine fails on it."""
        if self._read is None:
            self.setup()
        assert self._read is not None
        try:
            return self._read(image)
        except Exception as error:  # of the engine; one picture must not cost the others their scores
            self.last_error = f"OCR failed on a picture of {image.shape[1]} x {image.shape[0]} pixels: {type(error).__name__}: {error}"
            return None
