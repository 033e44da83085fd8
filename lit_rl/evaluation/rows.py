"""Prompts of an evaluation set: `.csv`, `.txt`, `.jsonl` and `.parquet` files."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from lit_rl.errors import ConfigError, listed

PROMPTS = ("prompt", "caption")
"""Columns that have the prompt: the first one that is there and not empty."""


@dataclass(frozen=True)
class Row:
    """A prompt. index: of its file, by default its place. place: File and line. metadata: What the file says beside it."""

    prompt: str
    index: int
    place: str
    metadata: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))


def read_rows(file: Path) -> list[Row]:
    """The prompts of a file. Raises ConfigError with file, line and key for what is none, and for a file without any."""
    reader = READERS.get(file.suffix)
    if reader is None:
        raise ConfigError(f"{file}: evaluation sets are {', '.join(READERS)} files")
    try:
        rows = list(reader(file))
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: this is not UTF-8 (byte {error.object[error.start]:#04x}): save the file in that encoding") from error
    if not rows:
        raise ConfigError(f"{file}: holds no prompts")
    seen: dict[int, str] = {}
    for row in rows:
        if row.index in seen:
            raise ConfigError(
                f"{row.place}: index {row.index} stands at {seen[row.index]} already: images are named by it, give each another"
            )
        seen[row.index] = row.place
    return rows


def _csv(file: Path) -> Iterator[Row]:
    with open(file, newline="", encoding="utf-8-sig") as lines:
        table = csv.DictReader(lines)
        for number, values in enumerate(table):
            place = f"{file}:{table.line_num}"
            if None in values:
                raise ConfigError(f"{place}: more cells than the header's {listed(list(table.fieldnames or ()))}: quote cells with commas")
            yield _row({key: value for key, value in values.items() if value is not None}, number, place)


def _txt(file: Path) -> Iterator[Row]:
    lines = [(i, line.strip()) for i, line in enumerate(file.read_text(encoding="utf-8-sig").split("\n"), 1)]
    for number, (line, text) in enumerate((i, text) for i, text in lines if text):
        yield Row(text, number, f"{file}:{line}")


def _jsonl(file: Path) -> Iterator[Row]:
    lines = [(i, line) for i, line in enumerate(file.read_text(encoding="utf-8-sig").split("\n"), 1) if line.strip()]
    for number, (line, text) in enumerate(lines):
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{file}:{line}: not JSON ({error.msg} at column {error.colno}); each line must be one object") from error
        if not isinstance(value, dict):
            raise ConfigError(f'{file}:{line}: expected an object such as {{"prompt": ...}}, found {type(value).__name__}')
        yield _row(value, number, f"{file}:{line}")


def _parquet(file: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file)
    except pyarrow.ArrowInvalid as error:
        raise ConfigError(f"{file}: not a Parquet file: {error}") from error
    for number, values in enumerate(table.to_pylist()):
        yield _row({key: value for key, value in values.items() if value is not None}, number, f"{file}: row {number + 1}")


READERS: Mapping[str, Callable[[Path], Iterator[Row]]] = {".csv": _csv, ".txt": _txt, ".jsonl": _jsonl, ".parquet": _parquet}


def _row(values: Mapping[str, object], number: int, place: str) -> Row:
    prompt = next((text for key in PROMPTS if isinstance(text := values.get(key), str) and text.strip()), None)
    if prompt is None:
        raise ConfigError(f"{place}: `prompt` (or `caption`) must be a text that is not empty; found {listed(sorted(values)) or 'nothing'}")
    try:
        index = int(str(values.get("index", number)))
    except ValueError as error:
        raise ConfigError(f"{place}: index={values['index']!r} must be a whole number") from error
    return Row(prompt, index, place, MappingProxyType(dict(values)))
