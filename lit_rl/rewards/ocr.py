"""Does the image show the text that the prompt asks for? PP-OCRv6 on the CPU; the models come inside the rapidocr wheel."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lit_rl.rewards.base import Reward
from lit_rl.rewards.masks import look_through, mask_of
from lit_rl.types import Info

Reading = tuple[str, float]
"""What was read, and the mean confidence in [0, 1] ("" and 0.0 on a blank image)."""

_DOUBLE = re.compile(r'["“]([^"“”]*)["”]')
_SINGLE = re.compile(r"(?<!\w)'(.+?)'(?!\w)")


def find_target(info: Info) -> str | None:
    """The text to show: `info["target"]`, else in the prompt's first double quotes, else in its first single ones, else `info["text"]`.

    An apostrophe is not a quote: `The text is 'don't panic'` gives `don't panic`. None when there is no text, or only white space.
    """
    if str(info.get("target") or "").strip():
        return str(info["target"])
    prompt = str(info["prompt"])
    quoted = _DOUBLE.search(prompt) or _SINGLE.search(prompt)
    text = quoted.group(1) if quoted else info.get("text")
    return str(text) if text and str(text).strip() else None


def normalize(text: str, how: Literal["compact", "exact"]) -> str:
    """`compact`: lower case without white space, as Flow-GRPO compares; `exact`: only surrounding white space is dropped."""
    return "".join(text.lower().split()) if how == "compact" else text.strip()


def similarity(read: str, target: str, *, how: Literal["compact", "exact"] = "compact", anywhere: bool = False) -> float:
    """max(0, 1 - Levenshtein(read, target) / len(target)), in [0, 1] (Flow-GRPO, arXiv 2505.05470, section 4).

    anywhere: a reading that contains the target counts 1, as in the authors' code. Off by default: it pays for writing more.
    """
    from rapidfuzz.distance import Levenshtein

    got, want = normalize(read, how), normalize(target, how)
    if anywhere and want in got:
        return 1.0
    return max(0.0, 1.0 - Levenshtein.distance(got, want) / len(want))


def trim(image: np.ndarray, *, threshold: int = 48, margin: int = 2) -> np.ndarray:
    """The box around all pixels that differ from the median colour by more than `threshold`, plus a margin; everything if none do."""
    differs = (np.abs(image.astype(np.int16) - np.median(image.reshape(-1, 3), axis=0)) > threshold).any(-1)
    rows, cols = np.flatnonzero(differs.any(1)), np.flatnonzero(differs.any(0))
    if not len(rows):
        return image
    return image[max(0, rows[0] - margin) : rows[-1] + 1 + margin, max(0, cols[0] - margin) : cols[-1] + 1 + margin]


class OCRReward(Reward):
    """`ocr_similarity` in [0, 1] (NaN when the prompt names no text) and `ocr_confidence` in [0, 1].

    Args:
        detect: find the lines of text first (0.15-0.5 s an image). Off: what is read is taken as one line (20-50 ms), which is right for
            rendered words and for inpainting.
        trim: without `detect`, crop to the ink before reading. Words of 2-5 letters in three fonts, canvases 16-64 pixels high: all
            clean or blurred ones were read (without: 56-100 %); no difference under heavy noise.
        compare: `compact` ignores case and white space, `exact` does not.
        anywhere: a reading that contains the target counts as exact.
        detect_side: shorter side in pixels to which `detect` enlarges an image.
        threads: of ONNX Runtime. One per process is the fastest choice beside a training run.

    With `info["mask"]`, Tensor or array "H W", only the part of the image where it is above 0 is read; what stands elsewhere does not
    count. Images are read one by one, so a score does not depend on its batch. Text is read reliably from a cap height of 7 pixels on.
    """

    outputs = ("ocr_similarity", "ocr_confidence")

    def __init__(
        self,
        *,
        detect: bool = False,
        trim: bool = True,
        compare: Literal["compact", "exact"] = "compact",
        anywhere: bool = False,
        detect_side: int = 512,
        threads: int = 1,
    ) -> None:
        if compare not in ("compact", "exact"):
            raise ValueError(f"compare={compare!r}; choose `compact` or `exact`")
        self.detect = detect
        self.trim = trim
        self.compare: Literal["compact", "exact"] = compare
        self.anywhere = anywhere
        self.detect_side = detect_side
        self.threads = threads
        self._engine: Callable[[np.ndarray], Reading] | None = None

    def setup(self, *, rank: int = 0, world_size: int = 1, device: str = "cpu") -> None:
        if self._engine is None:
            self._engine = _detector(self.detect_side, self.threads) if self.detect else _recognizer(self.threads)

    def read(self, images: Sequence[np.ndarray]) -> list[Reading]:
        """RGB images uint8 [H, W, 3] of any sizes -> text and confidence of each."""
        self.setup()
        assert self._engine is not None
        return [self._engine(np.ascontiguousarray((trim(i) if self.trim and not self.detect else i)[..., ::-1])) for i in images]

    def grade(self, readings: Sequence[Reading], info: Sequence[Info]) -> dict[str, Tensor]:
        """Compare what was read with what each prompt asks for."""
        similar = [
            float("nan") if (target := find_target(row)) is None else similarity(text, target, how=self.compare, anywhere=self.anywhere)
            for (text, _), row in zip(readings, info, strict=True)
        ]
        return {"ocr_similarity": torch.tensor(similar), "ocr_confidence": torch.tensor([conf for _, conf in readings])}

    def score(self, media: Tensor, info: Sequence[Info]) -> Mapping[str, Tensor]:
        return self.explain(media, info)[0]

    def explain(self, media: Tensor, info: Sequence[Info]) -> tuple[Mapping[str, Tensor], Mapping[str, Sequence[str]]]:
        images = media.permute(0, 2, 3, 1).cpu().numpy()
        readings = self.read([_visible(image, row) for image, row in zip(images, info, strict=True)])
        return self.grade(readings, info), {"ocr_text": [text for text, _ in readings]}


def _visible(image: np.ndarray, info: Info) -> np.ndarray:
    mask = mask_of(info, *image.shape[:2])
    return image if mask is None else look_through(image, mask)


def _recognizer(threads: int) -> Callable[[np.ndarray], Reading]:
    """The recognition model alone; it resizes a line of any height to 48 pixels itself (enlarging before that only loses accuracy)."""
    engine = _engine(threads, {"Global.use_det": False})

    def read(image: np.ndarray) -> Reading:
        line = engine(image)
        return line.txts[0], float(line.scores[0])

    read(np.zeros((48, 48, 3), np.uint8))  # loads the model
    return read


def _detector(side: int, threads: int) -> Callable[[np.ndarray], Reading]:
    """Detection and recognition; lines from top to bottom joined by spaces. No angle classifier: it turns small text upside down."""
    engine = _engine(threads, {"Det.limit_side_len": side})

    def read(image: np.ndarray) -> Reading:
        lines = engine(image)
        if not lines.txts:
            return "", 0.0
        return " ".join(lines.txts), float(np.mean(lines.scores))

    read(np.zeros((48, 48, 3), np.uint8))  # loads the detector; the recogniser follows with the first text
    return read


def _engine(threads: int, options: Mapping[str, Any]) -> Callable[[np.ndarray], Any]:
    """PP-OCRv6 from the files of the wheel: named by path, they are neither looked for elsewhere nor downloaded."""
    import rapidocr

    models = Path(rapidocr.__file__).parent / "models"
    return rapidocr.RapidOCR(
        params={
            "Global.use_cls": False,
            "Global.use_preprocess_img": False,
            "Global.log_level": "error",  # it warns of every picture without text
            "EngineConfig.onnxruntime.intra_op_num_threads": threads,
            "EngineConfig.onnxruntime.inter_op_num_threads": threads,
            "Det.model_path": str(models / "PP-OCRv6_det_small.onnx"),
            "Rec.model_path": str(models / "PP-OCRv6_rec_small.onnx"),
            "Rec.rec_batch_num": 1,
            **options,
        }
    )
