"""Inpainting items, checked field by field."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from datamodules.picture_files import Box, header_size, white_of
from datamodules.text_files import Fields
from lit_rl.types import Size

REQUIRED = ("source", "mask", "text")


TEXTS = (*REQUIRED, "prompt", "target", "source_text")


FIELDS = (*TEXTS, "id", "reference", "split", "weight")


SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Item:
    """A checked item of a file."""

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
    fields: object


class _Check:
    """Turns entries into items and writes down what is wrong with them."""

    def __init__(self, root: Path, size: Size) -> None:
        self.root, self.size = root, size
        self.problems: list[str] = []
        self.ids: dict[str, str] = {}
        self.picture = cache(header_size)
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

    def _shape(self, fields: Fields, where: str) -> None:
        """Note fields that are missing, unknown or of a wrong type."""
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

    def _images(self, fields: Fields, where: str) -> Box | None:
        """The mask's box, after a look at every image of the item."""
        reference = fields.get("reference", [])
        references = reference if isinstance(reference, list) else [reference]
        pictures: dict[str, str] = {field: str(fields[field]) for field in ("source", "target") if field in fields}
        pictures |= {f"reference {name}": name for name in references}
        sizes: dict[str, Size] = {}
        for field, name in pictures.items():
            found = self.picture(self._path(name))
            if isinstance(found, str):
                self._wrong(where, f"{field.split()[0]}: {found}; relative paths count from {self.root}")
            else:
                sizes[field] = found
        mask = self.mask(self._path(str(fields["mask"])), self.size)
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


def _mask(path: Path, size: Size) -> tuple[Size, Box] | str:
    """Its size and the box around its white, or what is wrong with it."""
    from PIL import Image

    if isinstance(found := header_size(path), str):
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
