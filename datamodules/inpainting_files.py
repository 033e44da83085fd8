"""Inpainting items from JSON, JSONL and benchmark folders: read, checked field by field, and told apart by name when they are wrong."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from datamodules.lazy import Box, Size, check_frames, size_of, white_of
from datamodules.text_encoding import parse_json, read_text
from lit_rl.errors import ConfigError

REQUIRED = ("source", "mask", "text")
TEXTS = (*REQUIRED, "prompt", "target", "source_text")
FIELDS = (*TEXTS, "id", "reference", "split", "weight")
SPLITS = ("train", "val", "test")
BENCHMARKS = ("self_bench.txt", "cross_bench.txt")
SHOWN = 10
"""Problems named in one message."""


@dataclass(frozen=True)
class Item:
    """What an item of a file says, checked."""

    where: str  # file and place in it, for messages
    id: str
    text: str
    source: Path
    mask: Path
    box: Box  # around the white of the mask
    references: tuple[Path, ...]  # empty: the source inside the box
    prompt: str | None = None
    target: Path | None = None
    split: str | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Raw:
    """An entry as it stands in the file."""

    where: str
    index: int
    fields: Any


def read_items(path: Path, *, size: Size) -> list[Item]:
    """The items of a JSON or JSONL file or a benchmark folder, every image looked at. Raises one ConfigError for all that is wrong.

    size: (height, width) to which masks will be resized; one that is empty then is a problem too.
    """
    rows, root = read_rows(path)
    check = _Check(root, size)
    items = [check.item(row) for row in rows]
    if check.problems:
        more = len(check.problems) - SHOWN
        shown = check.problems[:SHOWN] + ([f"... and {more} more"] if more > 0 else [])
        count = f"{len(check.problems)} problem{'s' if len(check.problems) > 1 else ''}"
        raise ConfigError(f"{path}: {count} in the inpainting data\n" + "\n".join(f"  {line}" for line in shown))
    return [item for item in items if item is not None]


def read_rows(path: Path) -> tuple[list[Raw], Path]:
    """The entries, unchecked, and the folder from which their paths count."""
    path = path.expanduser()
    if path.is_dir():
        return read_benchmark(path), path
    if not path.exists():
        raise ConfigError(f"{path}: no such file or folder")
    if path.suffix not in (".json", ".jsonl"):
        raise ConfigError(
            f"{path}: inpainting items are read from .json and .jsonl files and benchmark folders ({' or '.join(BENCHMARKS)})"
        )
    text = read_text(path)
    rows, root = _jsonl(path, text) if path.suffix == ".jsonl" else _json(path, text)
    if not rows:
        raise ConfigError(f"{path}: holds no items")
    return rows, root


def _json(path: Path, text: str) -> tuple[list[Raw], Path]:
    try:
        content = parse_json(text)
    except json.JSONDecodeError as error:
        hint = "; a file with one object per line is named .jsonl" if error.msg == "Extra data" else ""
        raise ConfigError(f"{path}:{error.lineno}: not JSON ({error.msg} at column {error.colno}){hint}") from error
    head = {"items": content} if isinstance(content, list) else content
    if not isinstance(head, dict) or not isinstance(head.get("items"), list):
        found = f"an object with {sorted(head)}" if isinstance(head, dict) else type(head).__name__
        raise ConfigError(f'{path}: expected {{"version": 1, "root": "folder", "items": [...]}} or a list of items, found {found}')
    if unknown := sorted(head.keys() - {"version", "root", "items"}):
        raise ConfigError(f"{path}: beside items there may be version and root, found {unknown}")
    if head.get("version", 1) != 1:
        raise ConfigError(f"{path}: version is {head['version']!r}; this program reads version 1")
    if not isinstance(head.get("root", "."), str):
        raise ConfigError(f"{path}: root must be the name of a folder, is {head['root']!r}")
    rows = [Raw(f"{path.name}: items[{i}]", i, fields) for i, fields in enumerate(head["items"])]
    return rows, path.parent / Path(head.get("root", ".")).expanduser()


def _jsonl(path: Path, text: str) -> tuple[list[Raw], Path]:
    rows: list[Raw] = []
    for number, line in enumerate(text.split("\n"), start=1):  # JSON has other line separators in its strings
        if line.strip():
            try:
                rows.append(Raw(f"{path.name}:{number}", len(rows), parse_json(line)))
            except json.JSONDecodeError as error:
                raise ConfigError(f"{path}:{number}: not JSON ({error.msg} at column {error.colno}); each line must be one item") from error
    return rows, path.parent


def read_benchmark(folder: Path) -> list[Raw]:
    """`self_bench.txt` (lines `id-text`) and `cross_bench.txt` (lines `id-ref1,ref2-text`) beside `test{id}_{source,mask,ref}.png`.

    A self item without its `_ref.png` takes the crop of its source, which is what the published files hold.
    """
    lists = [folder / name for name in BENCHMARKS if (folder / name).is_file()]
    if not lists:
        found = sorted(p.name for p in folder.iterdir())[:8]
        raise ConfigError(f"{folder}: a benchmark folder holds {' or '.join(BENCHMARKS)}; found {found}. Or name a .json or .jsonl file")
    rows: list[Raw] = []
    for file in lists:
        cross = file.name == BENCHMARKS[1]
        line_format = re.compile(r"([^-,\s]+)-([^-\s]+)-(.+)" if cross else r"([^-,\s]+)-()(.+)")
        for number, line in enumerate(read_text(file).split("\n"), start=1):
            if not line.strip():
                continue
            parts = line_format.fullmatch(line.strip())
            if parts is None:
                expected = "id-ref1,ref2-text" if cross else "id-text"
                raise ConfigError(f"{file}:{number}: expected `{expected}`, found {line.strip()!r}")
            name, references, text = parts.groups()
            files = [f"test{ref}_ref.png" for ref in references.split(",")] if cross else [f"test{name}_ref.png"]
            fields: dict[str, Any] = {"id": f"cross-{name}" if cross else name}
            fields |= {"source": f"test{name}_source.png", "mask": f"test{name}_mask.png"}
            if cross or (folder / files[0]).is_file():
                fields["reference"] = files if len(files) > 1 else files[0]
            rows.append(Raw(f"{file.name}:{number}", len(rows), fields | {"text": text.strip()}))
    if not rows:
        raise ConfigError(f"{' and '.join(map(str, lists))}: no items")
    return rows


class _Check:
    """Turns entries into items and writes down what is wrong with them."""

    def __init__(self, root: Path, size: Size) -> None:
        self.root, self.size = root, size
        self.problems: list[str] = []
        self.ids: dict[str, str] = {}
        self.picture = cache(_picture)
        self.mask = cache(_mask)

    def item(self, row: Raw) -> Item | None:
        known = len(self.problems)
        fields = row.fields
        if not isinstance(fields, dict):
            self._wrong(row.where, f"expected an object with source, mask and text, found {type(fields).__name__}")
            return None
        given = fields.get("id")
        where = row.where if given is None else f"{row.where} ({given})"
        self._shape(fields, where)
        if len(self.problems) > known:
            return None
        name = str(row.index if given is None else given)
        if name in self.ids:
            self._wrong(where, f"id: {name!r} is also the id of {self.ids[name]}; give each item its own, or leave it out")
        self.ids[name] = row.where
        box = self._images(fields, where)
        if len(self.problems) > known or box is None:
            return None
        reference = fields.get("reference", [])
        target = fields.get("target")
        if target is None and fields.get("source_text") == fields["text"]:
            target = fields["source"]
        return Item(
            where=where,
            id=name,
            text=fields["text"],
            source=self._path(fields["source"]),
            mask=self._path(fields["mask"]),
            box=box,
            references=tuple(map(self._path, [reference] if isinstance(reference, str) else reference)),
            prompt=fields.get("prompt"),
            target=None if target is None else self._path(target),
            split=fields.get("split"),
            weight=float(fields.get("weight", 1.0)),
        )

    def _shape(self, fields: Mapping[str, Any], where: str) -> None:
        """Which fields there are, and what they hold."""
        for field in fields.keys() - set(FIELDS):
            close = difflib.get_close_matches(str(field), FIELDS, n=1)
            self._wrong(where, f"{field}: no such field; {f'did you mean {close[0]}?' if close else f'there are {sorted(FIELDS)}'}")
        for field in REQUIRED:
            if field not in fields:
                self._wrong(where, f"{field}: missing; every item needs {', '.join(REQUIRED)}")
        for field in (*TEXTS, "id"):
            value = fields.get(field, "-")
            if isinstance(value, str) and not value.strip():
                self._wrong(where, f"{field}: is empty; {'write the wanted text' if field == 'text' else 'fill it or leave it out'}")
            elif not isinstance(value, str) and not (field == "id" and type(value) is int):
                self._wrong(where, f"{field}: must be a string, is {value!r}")
        reference = fields.get("reference", "-")
        names = [reference] if isinstance(reference, str) else reference
        if not isinstance(names, list) or not names or not all(isinstance(n, str) and n.strip() for n in names):
            self._wrong(where, f"reference: must be a file or a list of files, is {reference!r}; leave it out to take the masked part")
        if (split := fields.get("split", "train")) not in SPLITS:
            self._wrong(where, f"split: must be {', '.join(SPLITS[:-1])} or {SPLITS[-1]}, is {split!r}")
        weight = fields.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not (math.isfinite(weight) and weight > 0):
            self._wrong(where, f"weight: must be a number above 0, is {weight!r}; to keep an item out of training set split to val")

    def _images(self, fields: Mapping[str, Any], where: str) -> Box | None:
        """The mask's box, after a look at every image of the item."""
        reference = fields.get("reference", [])
        pictures = {field: fields[field] for field in ("source", "target") if field in fields}
        pictures |= {f"reference {name}": name for name in ([reference] if isinstance(reference, str) else reference)}
        sizes: dict[str, Size] = {}
        for field, name in pictures.items():
            found = self.picture(self._path(name))
            if isinstance(found, str):
                self._wrong(where, f"{field.split()[0]}: {found}; relative paths count from {self.root}")
            else:
                sizes[field] = found
        mask = self.mask(self._path(fields["mask"]), self.size)
        if isinstance(mask, str):
            self._wrong(where, f"mask: {mask}")
            return None
        for field, size in {"mask": mask[0], "target": sizes.get("target")}.items():
            if size and "source" in sizes and size != sizes["source"]:
                (h, w), (height, width) = size, sizes["source"]
                self._wrong(where, f"{field}: is {w} x {h} pixels, source is {width} x {height} (width x height); they must be equal")
        return mask[1]

    def _path(self, name: str) -> Path:
        return self.root / Path(name).expanduser()

    def _wrong(self, where: str, what: str) -> None:
        self.problems.append(f"{where}: {what}")


def _picture(path: Path) -> Size | str:
    """Its size from the header, or what is wrong with it."""
    from PIL import Image

    if not path.is_file():
        return f"no such file {path}"
    try:
        with Image.open(path) as image:
            check_frames(image)
            return size_of(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return f"{path} is not an image that can be read ({error})"


def _mask(path: Path, size: Size) -> tuple[Size, Box] | str:
    """Its size and the box around its white, or what is wrong with it."""
    from PIL import Image

    if isinstance(found := _picture(path), str):
        return found
    try:
        with Image.open(path) as image:
            grey = white_of(image)
    except (OSError, ValueError, SyntaxError) as error:
        return f"{path} is not an image that can be read ({error})"
    box = grey.getbbox()
    if box is None:
        return f"{path} is all black; white is where the text goes"
    if grey.resize(size[::-1], Image.Resampling.NEAREST).getbbox() is None:
        return f"{path} has nothing white left at {size[1]} x {size[0]} pixels; make the region larger or raise data.resolution"
    return found, box
