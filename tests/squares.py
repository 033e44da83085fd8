"""Where is the square: a visual task that a miniature learns in seconds, as files of rows and pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lit_rl.rewards.base import TextReward
from lit_rl.types import Info

CORNERS = ("1", "2", "3", "4")
"""Upper left, upper right, lower left, lower right."""


class Corner(TextReward):
    """1 for the corner that the row names."""

    outputs = ("exact",)

    def score(self, media: Sequence[str], info: Sequence[Info]) -> Mapping[str, Tensor]:
        return {"exact": torch.tensor([float(text == row["answer"]) for text, row in zip(media, info, strict=True)])}


def square(corner: int, rng: np.random.RandomState, side: int = 56) -> Image.Image:
    """A bright square in a corner of a dark, noisy picture."""
    pixels = rng.randint(0, 60, (side, side, 3))
    half, size = side // 2, side // 2 - 8
    top, left = (half * n + rng.randint(1, half - size) for n in divmod(corner, 2))
    pixels[top : top + size, left : left + size] = rng.randint(150, 255, 3)
    return Image.fromarray(pixels.astype(np.uint8))


def write_squares(folder: Path, count: int, *, seed: int = 0, name: str = "train") -> Path:
    """`count` rows with a picture each, for prompts and for demonstrations."""
    rng = np.random.RandomState(seed)
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(count):
        corner = int(rng.randint(4))
        path = f"pictures/{name}-{i}.png"
        square(corner, rng).save(folder / path)
        turns = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": CORNERS[corner]}]
        rows.append({"prompt": turns[:1], "messages": turns, "images": [path], "answer": CORNERS[corner]})
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_ragged(folder: Path, count: int) -> Path:
    """Rows with 0, 1, 2 or 3 pictures of different sizes; the answer is how many, and "4" for none."""
    rng = np.random.RandomState(0)
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(count):
        paths = [f"pictures/{i}-{n}.png" for n in range(i % 4)]
        for n, path in enumerate(paths):
            square(int(rng.randint(4)), rng, side=56 + 40 * n).save(folder / path)
        turns = [{"role": "user", "content": "<image>" * len(paths) + "?"}, {"role": "assistant", "content": CORNERS[i % 4 - 1]}]
        rows.append({"prompt": turns[:1], "messages": turns, "images": paths or None, "answer": CORNERS[i % 4 - 1]})
    file = folder / "ragged.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
