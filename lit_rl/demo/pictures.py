"""The demo's pictures: curves, and what the same prompts and noises gave before and after reinforcement learning."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, TypeAlias

from lit_rl.demo.curves import Curve, Known, Stage, Stages, images_seen, over_images

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

BLUE, GREEN, GREY = "#1f6feb", "#2da44e", "#9aa5b1"
LABELS = {"held_out_accuracy": "held-out prompts read exactly right", "held_out_ink_similarity": "likeness of the ink to the reference's"}
LINES = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"))
"""Line style and marker of a method's first seeds."""
DPI = 150
Panel: TypeAlias = "tuple[str, Picture]"
"""A title and a picture below it."""
COLUMNS = "columns"
"""Key in a picture's `info`: places from its left edge, and what is written above them."""
STAGES: Mapping[Stage, str] = {"after_warmup": "after the warm-up", "after_rl": "after RL"}


def draw(path: Path, title: str, curves: Mapping[str, Curve], scores: Mapping[str, str], panels: Sequence[Panel]) -> None:
    """One PNG: training reward and held-out numbers over the images trained on, and beside it titled pictures."""
    figure, (left, *others) = _plt().subplots(
        1, 1 + len(panels), figsize=(13, 4.2), width_ratios=[1.25, *[2 / len(panels)] * len(panels)], layout="constrained"
    )
    left.plot(images_seen(curves)[1:], curves["reward_mean"].values, color=GREY, label="training reward (mean of the iteration)")
    for (name, tag), colour in zip(scores.items(), (BLUE, GREEN)):
        left.plot(*over_images(curves, tag), color=colour, marker="o", label=LABELS[name])
    left.set(xlabel="images of reinforcement learning", ylim=(0, 1.03), title=title)
    left.grid(alpha=0.3)
    left.legend(loc="lower right")
    for axis, (words, picture) in zip(others, panels):
        axis.imshow(picture, interpolation="nearest")
        axis.set_title(words)
        axis.spines[:].set_visible(False)
        named = picture.info.get(COLUMNS, [])
        axis.set_xticks([x for x, _ in named], [name for _, name in named], fontsize=8)
        axis.set_yticks([])
        axis.tick_params(length=0, labelbottom=False, labeltop=True, pad=0)
    figure.savefig(path, dpi=DPI)


def compare(path: Path, known: Known) -> None:
    """One PNG: held-out accuracy over the images trained on, a colour for each method and a kind of line for each seed."""
    figure, axis = _plt().subplots(figsize=(6.5, 4), layout="constrained")
    for i, (method, seeds) in enumerate(sorted(known.items())):
        for (seed, (images, accuracy)), (line, marker) in zip(sorted(seeds.items(), key=lambda run: int(run[0])), cycle(LINES)):
            axis.plot(images, accuracy, line, color=f"C{i}", marker=marker, markersize=5, label=f"{method}, seed {seed}")
    axis.set(xlabel="images of reinforcement learning", ylabel=LABELS["held_out_accuracy"], ylim=(0, 1.03))
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right")
    figure.savefig(path, dpi=DPI)


def _plt() -> ModuleType:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def written_numbers(out: Path, accuracy: Stages, *, samples: int = 40) -> list[Panel]:
    """Two sheets: pictures after the warm-up, and after reinforcement learning."""
    return [(f"{title}: {accuracy[stage]:.0%} right", contact_sheet(out / "images" / stage, samples)) for stage, title in STAGES.items()]


def evaluated_numbers(out: Path, accuracy: Stages, *, samples: int = 40) -> list[Panel]:
    """Two sheets as `written_numbers`, of the first and the last evaluation of the set `numbers`."""
    folders = sorted((out / "eval").glob("step_*/numbers"), key=lambda folder: int(folder.parent.name.removeprefix("step_")))
    ends = {"after_warmup": folders[0], "after_rl": folders[-1]}
    for folder in ends.values():
        with open(folder / "unigenbench_scores.csv", newline="", encoding="utf-8") as table:
            rows = [{"file": row["file"], "prompt": row["prompt"]} for row in csv.DictReader(table)]
        (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [(f"{title}: {accuracy[stage]:.0%} right", contact_sheet(ends[stage], samples)) for stage, title in STAGES.items()]


def contact_sheet(folder: Path, samples: int, *, columns: int = 5, zoom: int = 3) -> Picture:
    """The first images of a prediction in rows, each enlarged, with the number that was asked for beside it."""
    from PIL import Image

    rows = predicted(folder)[:samples]
    images = [Image.open(folder / row["file"]) for row in rows]
    width, height = images[0].width * zoom, images[0].height * zoom
    label, gap = 40, 6
    count = -(-len(images) // columns)
    sheet = Image.new("RGB", (label + columns * (width + gap), count * (height + gap)), "white")
    for i, (row, image) in enumerate(zip(rows, images)):
        line, column = divmod(i, columns)
        if column == 0:
            _label(sheet, row["prompt"].split('"')[1], 2, line * (height + gap) + height // 4, size=22)
        sheet.paste(_enlarged(image, zoom), (label + column * (width + gap), line * (height + gap)))
    return sheet


def filled_signs(out: Path, accuracy: Stages, *, samples: int = 14) -> list[Panel]:
    """One sheet: of each held-out item what is given (number, picture with its hole, reference) and what was made of it."""
    items = json.loads((out / "items.json").read_text())
    held_out = [item for item in items["items"] if item["split"] == "val"][:samples]
    sheet = sign_sheet(out / items["root"], held_out, [out / "images" / stage for stage in STAGES])
    right = ", ".join(f"{title} ({accuracy[stage]:.0%} right)" for stage, title in STAGES.items())
    return [(right, sheet)]


def sign_sheet(images: Path, items: Sequence[Mapping[str, str]], stages: Sequence[Path], *, columns: int = 2, zoom: int = 3) -> Picture:
    """A tile per item: its number, its source with the masked part hatched, its reference, and its picture of each stage.

    `info` of the sheet says where these columns are.
    """
    from PIL import Image

    tiles: list[Picture] = []
    centres: list[float] = []
    label, gap = 32, 4
    predictions = [[folder / row["file"] for row in predicted(folder)] for folder in stages]
    for i, item in enumerate(items):
        source, mask, reference = (Image.open(images / item[field]) for field in ("source", "mask", "reference"))
        parts = [_with_hole(_enlarged(source, zoom), _enlarged(mask, zoom)), _enlarged(reference, zoom)]
        parts += [_enlarged(Image.open(files[i]), zoom) for files in predictions]
        tile = Image.new("RGB", (label + sum(part.width + gap for part in parts), parts[0].height + gap), "white")
        _label(tile, item["text"], 2, parts[0].height // 4, size=20)
        x, centres = label, []
        for part in parts:
            centres.append(x + part.width / 2)
            tile.paste(part, (x, (parts[0].height - part.height) // 2))
            x += part.width + gap
        tiles.append(tile)
    width, height = tiles[0].width + 14, tiles[0].height
    sheet = Image.new("RGB", (columns * width, -(-len(tiles) // columns) * height), "white")
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (i % columns * width, i // columns * height))
    names = [(label / 2, "wanted"), *zip(centres, ("hole", "reference", "warm-up", "RL"))]
    sheet.info[COLUMNS] = [(column * width + x, name) for column in range(columns) for x, name in names]
    return sheet


def _with_hole(source: Picture, mask: Picture) -> Picture:
    """The source, hatched where the mask is white."""
    from PIL import Image

    hatch = Image.new("RGB", source.size, "white")
    hatch.putdata(
        [(150, 150, 150) if (i % source.width + i // source.width) % 6 == 0 else (255, 255, 255) for i in range(hatch.width * hatch.height)]
    )
    return Image.composite(hatch, source.convert("RGB"), mask.convert("L"))


def predicted(folder: Path) -> list[dict[str, str]]:
    """The rows of a prediction, in the order of its prompts."""
    return [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]


def _enlarged(image: Picture, zoom: int) -> Picture:
    from PIL import Image

    return image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)


def _label(sheet: Picture, text: str, x: int, y: int, *, size: int) -> None:
    from PIL import ImageDraw, ImageFont

    ImageDraw.Draw(sheet).text((x, y), text, fill=BLUE, font=ImageFont.load_default(size))
