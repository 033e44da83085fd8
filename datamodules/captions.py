"""Prompts of one file: a text with one a line, JSON lines, or a table, whose prompts may be called captions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import overload

from datamodules.lines import Lines, NotJSON, Stored, json_row
from datamodules.parquet import Parquet
from datamodules.text_files import InvalidRow
from datamodules.verdicts import Verdict, alone, keep, named, recall
from lit_rl.errors import ConfigError
from lit_rl.types import Info

SUFFIXES = (".txt", ".jsonl", ".parquet")
NAMES = ("prompt", "caption")
"""Keys of a prompt, the first that a row has."""


class Captions(Sequence[Info]):
    """The prompts of a file, left on the disk. Raises ConfigError with file and line, or row, for one that is none."""

    def __init__(self, path: Path) -> None:
        if path.suffix not in SUFFIXES:
            raise ConfigError(f"{path}: prompts are read from {', '.join(SUFFIXES)} files")
        if not path.is_file():
            raise ConfigError(f"{path}: no such file")
        self.path = path
        self.rows: Stored[object] = Parquet(path) if path.suffix == ".parquet" else Lines(path, str if path.suffix == ".txt" else json_row)
        if not len(self.rows):
            raise ConfigError(f"{path}: holds no prompts")
        if recall(name := named(["captions", self.rows.digest, path.suffix])) is None:
            with alone(name, rows=len(self)):
                if recall(name) is None:  # another process of the run may have looked meanwhile
                    for _ in self:
                        pass
                    keep(name, Verdict(), rows=len(self))

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, i: int) -> Info: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[Info]: ...
    def __getitem__(self, i: int | slice) -> Info | Sequence[Info]:
        numbers = range(len(self))
        return [self[k] for k in numbers[i]] if isinstance(i, slice) else self._info(numbers[i], self.rows[numbers[i]])

    def __iter__(self) -> Iterator[Info]:
        return (self._info(i, row) for i, row in enumerate(self.rows))

    def where(self, i: int) -> str:
        """File and line, or row, of prompt `i`."""
        return f"{self.path}:{self.rows.line(i)}" if isinstance(self.rows, Lines) else f"{self.path}: row {i + 1}"

    def _info(self, i: int, row: object) -> Info:
        if isinstance(row, str) and self.path.suffix == ".txt":
            return MappingProxyType({"prompt": row.strip()})
        if isinstance(row, NotJSON):
            raise InvalidRow(f"{self.where(i)}: {row.reason}")
        if not isinstance(row, dict):
            raise InvalidRow(f'{self.where(i)}: expected an object such as {{"prompt": ...}}, found {type(row).__name__}')
        text = next((row[name] for name in NAMES if row.get(name) is not None), None)
        if not isinstance(text, str) or not text.strip():
            raise InvalidRow(f"{self.where(i)}: one of the keys {' and '.join(NAMES)} must be a non-empty string; found {sorted(row)}")
        return MappingProxyType({**row, "prompt": text})
