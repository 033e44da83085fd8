"""Pictures to imitate beside reinforcement learning, from several lists, each drawn as often as its weight says (DeepGen's SFT-aux)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import torch
import yaml
from torch import Tensor

from datamodules.deepgen_sources import python_sources
from datamodules.inpainting_files import read_rows
from datamodules.picture_files import read_picture
from lit_rl.errors import ConfigError, listed
from lit_rl.replay.sources import PictureSource
from lit_rl.seeding import generator
from lit_rl.types import ALL, Info, Size

MOST = 2**24
"""Rows that `torch.multinomial` draws from."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A list of pictures.

    Args:
        path: `.json` (a list) or `.jsonl`, objects with `image_path` and `txt`.
        folder: From which `image_path` counts; default: that of `path`.
        weight: Each of its pictures is drawn so often in comparison with one of another list.
        size: Pictures get the area of a square with this side; default: that of `PictureSources`.
    """

    path: str
    folder: str | None = None
    weight: float = 1.0
    size: int | None = None


class PictureSources(PictureSource):
    """Pictures of several lists with their prompts, drawn with replacement, each scaled to sides that are multiples of 32.

    Args:
        sources: The lists; or a YAML or JSON file with `sources: [{path: ..., weight: ...}]`, from whose folder their paths count, or
            DeepGen-RL's Python file (`resize` says how pictures are scaled, whatever stands there).
        size: Side of the square whose area pictures get.
        resize: `area` scales to that area, `longest` down to `size` pixels of the longer side; sides are rounded up to `multiple`. `square`
            stretches all to size x size: one forward for all of them.
        multiple: Pixels.
        drop_prompt: Share of the examples whose prompt is empty, in [0, 1): what guidance at inference asks for.
        seed: Of what is drawn.
    """

    def __init__(
        self,
        sources: str | list[Source] | None = None,
        *,
        size: int = 512,
        resize: Literal["area", "longest", "square"] = "area",
        multiple: int = 32,
        drop_prompt: float = 0.1,
        seed: int = 0,
    ) -> None:
        if not sources:
            raise ConfigError("model.supervised.data.sources: name lists of pictures, or set SFTAUX_DATASET_CONFIG")
        if not 0 <= drop_prompt < 1 or min(size, multiple) < 1:
            raise ConfigError(
                f"model.supervised.data: drop_prompt={drop_prompt} must be in [0, 1), size={size} and multiple={multiple} >= 1"
            )
        self.size, self.resize, self.multiple, self.drop_prompt, self.seed = size, resize, multiple, drop_prompt, seed
        self.various_sizes = resize != "square"
        found = read_sources(Path(sources).expanduser()) if isinstance(sources, str) else sources
        self.rows: list[tuple[Path, str, int]] = []
        weights: list[float] = []
        for source in found:
            rows = list(_rows(source, size))
            self.rows += rows
            weights += [_weight(source)] * len(rows)
        if len(self.rows) > MOST:
            raise ConfigError(f"model.supervised.data: {len(self.rows)} pictures, and at most {MOST} can be drawn from: leave some out")
        self.weights = torch.tensor(weights, dtype=torch.float64)

    def examples(self, step: int, count: int, part: slice = ALL) -> tuple[Sequence[Info], Tensor | Sequence[Tensor]]:
        draw = generator(self.seed, "examples", step)
        chosen = weighted_rows(self.weights, count, draw)[part]
        bare = (torch.rand(count, generator=draw) < self.drop_prompt).tolist()[part]
        info = [MappingProxyType({"prompt": "" if empty else self.rows[i][1]}) for i, empty in zip(chosen, bare, strict=True)]
        images = [self.picture(*self.rows[i]) for i in chosen]
        return info, images if self.various_sizes else torch.stack(images)

    def picture(self, file: Path, prompt: str, size: int) -> Tensor:
        """uint8 "3 H W" of the size at which it is imitated."""
        from PIL import Image

        where = f"model.supervised.data: {file}"
        try:
            with Image.open(file) as image:
                sides = image.size[::-1]
        except OSError as error:
            raise ConfigError(f"{where} cannot be read ({error}): mend the file, or leave it out of its list") from error
        target = (size, size) if self.resize == "square" else resized(sides, size=size, by=self.resize, multiple=self.multiple)
        return read_picture(file, target, None, None, where=where)


def weighted_rows(weights: Tensor, count: int, draw: torch.Generator) -> list[int]:
    """`count` rows in proportion to their weights, with replacement, as DeepGen's WeightedInfiniteSampler draws them."""
    return torch.multinomial(weights, count, replacement=True, generator=draw).tolist()


def resized(sides: Size, *, size: int, by: Literal["area", "longest"], multiple: int = 32) -> Size:
    """(height, width) of a picture that is scaled to size^2 pixels, or down to `size` of its longer side; rounded up to `multiple`."""
    height, width = sides
    scale = size / math.sqrt(height * width) if by == "area" else min(1.0, size / max(sides))
    return math.ceil(height * scale / multiple) * multiple, math.ceil(width * scale / multiple) * multiple


def read_sources(path: Path) -> list[Source]:
    """The lists that a YAML, a JSON or DeepGen's Python file names, which is not executed. Raises ConfigError that names file and key."""
    if path.suffix not in (".yaml", ".yml", ".json", ".py"):
        raise ConfigError(f"{path}: pictures to imitate are named in .yaml, .json or DeepGen-RL's .py")
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    if path.suffix == ".py":
        return [_of_python(entry) for entry in python_sources(path)[0]]
    content = yaml.safe_load(path.read_text())
    entries = content.get("sources") if isinstance(content, Mapping) else content
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{path}: needs sources: [{{path: LIST.json, weight: 1.0}}, ...]")
    known = Source.__dataclass_fields__.keys()
    for i, entry in enumerate(entries):
        if not isinstance(entry, Mapping) or "path" not in entry or entry.keys() - known:
            raise ConfigError(f"{path}: sources[{i}]={entry} must have path, and may have {listed(sorted(known - {'path'}))}")
    return [
        Source(**{**entry, **{key: str(path.parent / entry[key]) for key in ("path", "folder") if entry.get(key)}}) for entry in entries
    ]


def _of_python(entry: Mapping[str, object]) -> Source:
    folder, size = entry.get("folder"), entry.get("size")
    return Source(
        path=str(entry["path"]), folder=None if folder is None else str(folder), weight=float(str(entry.get("weight", 1.0))),
        size=size if isinstance(size, int) else None,
    )  # fmt: skip


def _rows(source: Source, size: int) -> list[tuple[Path, str, int]]:
    """File, prompt and size of each picture of a list."""
    rows, folder = read_rows(Path(source.path))
    place = Path(source.folder).expanduser() if source.folder else folder
    found: list[tuple[Path, str, int]] = []
    for row in rows:
        fields = row.fields if isinstance(row.fields, Mapping) else {}
        image, text = fields.get("image_path"), fields.get("txt")
        if not isinstance(image, str) or not isinstance(text, str):
            raise ConfigError(f"{source.path}: {row.where} needs image_path and txt, two texts; found {row.fields}")
        found.append((place / image, text, source.size or size))
    return found


def _weight(source: Source) -> float:
    if source.weight <= 0:
        raise ConfigError(f"{source.path}: weight={source.weight} must be above 0; leave the list out")
    return source.weight
