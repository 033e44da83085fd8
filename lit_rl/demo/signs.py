"""Signs to rewrite: small pictures with a hole for a number, whose ink another picture shows, as files for `datamodules.inpainting`."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image as Picture
    from PIL.ImageDraw import ImageDraw

HEIGHT, WIDTH = 16, 24
HOLE = 12, 16
"""Rows and columns of the hole, a pixel inside its board on every side."""
TOP, LEFT = 2, 4
"""Its first row and column."""
INKS = [(190, 0, 0), (0, 105, 0), (0, 0, 200)]
LINE_DISTANCE = 3
"""Columns from one printed line to the next. PP-OCRv6 reads 4 % of the digits through upright lines, but 62-98 % through level ones."""

Colour = tuple[int, int, int]


def write_signs(
    folder: str | Path,
    *,
    train: int = 640,
    held_out: int = 100,
    held_out_share: float = 0.2,
    lines_share: float = 0.0,
    wrong_ink_share: float = 0.0,
    seed: int = 0,
) -> Path:
    """Draw `train` and `held_out` items and return the JSON that lists them; no number is in both.

    Each has a source (a board with another number, grey), a mask, a reference (another number in the wanted ink) and a target. Of the
    training items, `lines_share` have targets with lines printed over the number, and `wrong_ink_share` targets in another ink than the
    reference's: supervised learning imitates that, rewards correct it. The held-out items are the same for every seed.
    """
    folder = Path(folder)
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    numbers = [f"{i:02d}" for i in range(100)]
    random.Random(0).shuffle(numbers)
    cut = round(held_out_share * len(numbers))
    mask_image().save(images / "mask.png")
    items = [
        _item(images, f"{split}-{i:04d}", number, split, random.Random(f"{split} {i} {own_seed}"), *defects)
        for split, known, count, own_seed, defects in (
            ("train", numbers[cut:], train, seed, (lines_share, wrong_ink_share)),
            ("val", numbers[:cut], held_out, 0, (0.0, 0.0)),
        )
        for i, number in enumerate(known[k % len(known)] for k in range(count))
    ]
    path = folder / "items.json"
    path.write_text(json.dumps({"version": 1, "root": "images", "items": items}, indent=1) + "\n")
    return path


def _item(
    images: Path, name: str, number: str, split: str, draw: random.Random, lines_share: float, wrong_ink_share: float
) -> dict[str, str]:
    ink, wrong_ink, _ = draw.sample(INKS, 3)
    wall, paper = _colour(draw, 70, 200), _colour(draw, 215, 255)
    others = [f"{i:02d}" for i in range(100) if f"{i:02d}" != number]
    lines, wrong = draw.random() < lines_share, draw.random() < wrong_ink_share
    pictures = {
        "source": sign(draw.choice(others), (110, 110, 110), wall=wall, paper=paper),
        "target": sign(number, wrong_ink if wrong else ink, wall=wall, paper=paper, lines=lines),
        "reference": swatch(draw.choice(others), ink, paper=_colour(draw, 235, 255)),
    }
    for what, picture in pictures.items():
        picture.save(images / f"{name}-{what}.png")
    files = {what: f"{name}-{what}.png" for what in pictures} | {"mask": "mask.png"}
    return {"id": name, **files, "text": number, "split": split}


def sign(number: str, ink: Colour, *, wall: Colour, paper: Colour, lines: bool = False) -> Picture:
    """A board on a wall with a number on it."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (WIDTH, HEIGHT), wall)
    pen = ImageDraw.Draw(image)
    pen.rectangle((LEFT - 1, TOP - 1, LEFT + HOLE[1], TOP + HOLE[0]), fill=paper)
    _write(pen, number, ink, LEFT, TOP)
    if lines:
        for column in range(LEFT + 1, LEFT + HOLE[1], LINE_DISTANCE):
            pen.line((column, TOP, column, TOP + HOLE[0] - 1), fill=ink)
    return image


def swatch(number: str, ink: Colour, *, paper: Colour) -> Picture:
    """A number in an ink, as large as a hole."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", HOLE[::-1], paper)
    _write(ImageDraw.Draw(image), number, ink, 0, 0)
    return image


def mask_image() -> Picture:
    """White where the number goes."""
    from PIL import Image, ImageDraw

    image = Image.new("L", (WIDTH, HEIGHT), 0)
    ImageDraw.Draw(image).rectangle((LEFT, TOP, LEFT + HOLE[1] - 1, TOP + HOLE[0] - 1), fill=255)
    return image


def _write(pen: ImageDraw, number: str, ink: Colour, left: int, top: int) -> None:
    """In the middle of the hole that begins there."""
    from PIL import ImageFont

    font = ImageFont.load_default(12)
    x0, y0, x1, y1 = pen.textbbox((0, 0), number, font=font)
    pen.text((left + (HOLE[1] - x1 - x0) // 2, top + (HOLE[0] - y1 - y0) // 2), number, fill=ink, font=font)


def _colour(draw: random.Random, low: int, high: int) -> Colour:
    return draw.randint(low, high), draw.randint(low, high), draw.randint(low, high)
