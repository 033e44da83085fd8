"""PP-OCRv6 on the CPU: one line of text, or all the text of a picture. The models come inside the rapidocr wheel."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

Reading = tuple[str, float]
"""The text that was read, and the mean confidence in [0, 1] ("" and 0.0 on a blank image)."""

DETECTION, RECOGNITION = "PP-OCRv6_det_small.onnx", "PP-OCRv6_rec_small.onnx"
LONGEST_LINE = 64
"""Width over height from which a line is squeezed: its time and memory grow with that ratio."""
LONGEST_SIDE = 2048
"""Pixels to which detection shrinks larger pictures."""
SLENDEREST = 8
"""Long over short side from which detection pads a picture."""


def line_reader(threads: int) -> Callable[[np.ndarray], Reading]:
    """Recognition alone, of RGB images uint8 [H, W, 3]; it resizes a line to 48 pixels (enlarging before that only loses accuracy)."""
    import cv2

    engine = _engine(threads, {"Global.use_det": False})

    def read(image: np.ndarray) -> Reading:
        height, width = image.shape[:2]
        if width > LONGEST_LINE * height:
            image = cv2.resize(image[:, :: max(1, width // 30_000)], (LONGEST_LINE * 48, 48))
        line = engine(np.ascontiguousarray(image[..., ::-1]))
        return line.txts[0], float(line.scores[0])

    read(np.zeros((48, 48, 3), np.uint8))  # loads the model
    return read


def scene_reader(side: int, threads: int) -> Callable[[np.ndarray], Reading]:
    """The lines of `lines_reader`, joined by spaces, and their mean confidence."""
    lines = lines_reader(side, threads)

    def read(image: np.ndarray) -> Reading:
        found = lines(image)
        return (" ".join(text for text, _ in found), float(np.mean([confidence for _, confidence in found]))) if found else ("", 0.0)

    return read


def lines_reader(side: int, threads: int) -> Callable[[np.ndarray], list[Reading]]:
    """Detection, then recognition of every line found, of RGB images uint8 [H, W, 3]; lines in order of reading.

    No angle classifier: it turns small text upside down.
    """
    engine = _engine(threads, {"Det.limit_side_len": 32})

    def read(image: np.ndarray) -> list[Reading]:
        lines = engine(np.ascontiguousarray(_prepared(image, side)[..., ::-1]))
        if not lines.txts:
            return []
        return [(lines.txts[i], float(lines.scores[i])) for i in reading_order(lines.boxes)]

    read(np.zeros((side, side, 3), np.uint8))  # loads the detector; its recogniser follows with the first text
    return read


@cache
def alphabet() -> frozenset[str]:
    """The characters that the recognition model knows."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(_models() / RECOGNITION), providers=["CPUExecutionProvider"])
    return frozenset(session.get_modelmeta().custom_metadata_map["character"].splitlines())


def reading_order(boxes: np.ndarray) -> list[int]:
    """Indices of boxes [N, 4, 2] (x, y of the corners, clockwise from the top left) row by row from the top, each from the left.

    Boxes are in one row when the middle of one lies within the other's height; rows follow the slant that most of the text has.
    """
    edges = boxes[:, 1] - boxes[:, 0] + boxes[:, 2] - boxes[:, 3]
    wide = np.linalg.norm(edges, axis=1) / 2
    high = np.linalg.norm(boxes[:, 3] - boxes[:, 0] + boxes[:, 2] - boxes[:, 1], axis=1) / 2
    level = edges[wide >= high]
    slant = float(np.median(np.arctan2(level[:, 1], level[:, 0]))) if len(level) else 0.0
    centre = boxes.mean(axis=1)
    x = centre[:, 0] * math.cos(slant) + centre[:, 1] * math.sin(slant)
    y = centre[:, 1] * math.cos(slant) - centre[:, 0] * math.sin(slant)
    rows: list[list[int]] = []
    for i in np.argsort(y, kind="stable").tolist():
        last = rows[-1][-1] if rows else None
        if last is not None and y[i] - y[last] < min(high[i], high[last]) / 2:
            rows[-1].append(i)
        else:
            rows.append([i])
    return [i for row in rows for i in sorted(row, key=x.__getitem__)]


def _prepared(image: np.ndarray, side: int) -> np.ndarray:
    """The picture in the size in which text is looked for: the shorter side enlarged to `side` (the longer to at most twice that), the
    longer shrunk to LONGEST_SIDE, a slender one padded with its median colour, so that no shape costs more than a large square."""
    import cv2

    height, width = image.shape[:2]
    scale = min(LONGEST_SIDE / max(height, width), max(1.0, min(side / min(height, width), 2 * side / max(height, width))))
    if scale != 1:
        size = max(1, round(width * scale)), max(1, round(height * scale))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    height, width = image.shape[:2]
    least = -(-max(height, width) // SLENDEREST)
    if min(height, width) >= least:
        return image
    canvas = np.full((max(height, least), max(width, least), 3), np.median(image.reshape(-1, 3), axis=0), np.uint8)
    top, left = (canvas.shape[0] - height) // 2, (canvas.shape[1] - width) // 2
    canvas[top : top + height, left : left + width] = image
    return canvas


def _engine(threads: int, options: Mapping[str, object]) -> Callable[[np.ndarray], Any]:
    """rapidocr with the files of the wheel: named by path, they are neither looked for elsewhere nor downloaded."""
    import rapidocr

    return rapidocr.RapidOCR(
        params={
            "Global.use_cls": False,
            "Global.use_preprocess_img": False,
            "Global.log_level": "error",  # it warns of every picture without text
            "EngineConfig.onnxruntime.intra_op_num_threads": threads,
            "EngineConfig.onnxruntime.inter_op_num_threads": threads,
            "Det.model_path": str(_models() / DETECTION),
            "Rec.model_path": str(_models() / RECOGNITION),
            "Rec.rec_batch_num": 1,
            **options,
        }
    )


def _models() -> Path:
    import rapidocr

    return Path(rapidocr.__file__).parent / "models"
