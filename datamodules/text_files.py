"""Rows from JSONL, JSON and Parquet files: checked all at once before training, given out one by one."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, islice
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, overload

import numpy as np
import xxhash

from datamodules.lines import Lines, NotJSON, Numbers, Stored, json_row
from datamodules.parquet import Fields, Parquet
from datamodules.text_encoding import parse_json, read_text
from datamodules.verdicts import Verdict, keep, named, recall
from lit_rl.errors import ConfigError, listed
from lit_rl.types import Info

if TYPE_CHECKING:
    pass

SHOWN = 10
"""Problems named in one message."""


class InvalidRow(ConfigError):
    """A row that cannot be used: its field, its value and the expected one."""


@dataclass(frozen=True)
class TextFile:
    """The rows of one file, unchecked. digest: It differs where the content of the file does."""

    path: Path
    rows: Sequence[object]
    digest: str

    @cached_property
    def stem(self) -> str:
        """Its name without suffix."""
        return self.path.stem

    def place(self, i: int) -> str:
        """File and line, or row, of row `i`."""
        return f"{self.path}:{self.rows.line(i)}" if isinstance(self.rows, Lines) else f"{self.path}: row {i + 1}"

    def onward(self, start: int) -> Iterator[object]:
        """The rows from number `start`."""
        return self.rows.onward(start) if isinstance(self.rows, Stored) else islice(self.rows, start, None)


class Rows(Sequence[Info]):
    """Rows of several files as read-only mappings, made when asked for; until then they stay on the disk, or in Arrow's memory.

    picked: Numbers of the rows over all files, rising.
    """

    name: str | None = None
    """It differs where any row does; None where that is not known."""

    def __init__(self, files: Sequence[TextFile], make: Callable[[Fields, TextFile, int], Fields], picked: Sequence[int]) -> None:
        self.files, self.make, self.picked = files, make, picked
        self.ends = list(accumulate(len(file.rows) for file in files))

    def __len__(self) -> int:
        return len(self.picked)

    @overload
    def __getitem__(self, i: int) -> Info: ...
    @overload
    def __getitem__(self, i: slice) -> Rows: ...
    def __getitem__(self, i: int | slice) -> Info | Rows:
        if isinstance(i, slice):
            return Rows(self.files, self.make, self.picked[i])
        file, row = self.find(self.picked[i])
        return MappingProxyType(self.make(present(file.rows[row]), file, self.picked[i]))

    def __iter__(self) -> Iterator[Info]:
        return (MappingProxyType(self.make(present(fields), file, number)) for fields, file, number in self.raw())

    def raw(self) -> Iterator[tuple[object, TextFile, int]]:
        """Fields as they stand in the file, that file and the row's number over all files: read many at a time."""
        numbers = iter(self.picked)
        wanted = next(numbers, None)
        for file, end in zip(self.files, self.ends):
            if wanted is None or wanted >= end:
                continue
            for number, fields in enumerate(file.onward(wanted - end + len(file.rows)), start=wanted):
                if number == wanted:
                    yield fields, file, number
                    wanted = next(numbers, None)
                if wanted is None or wanted >= end:
                    break

    def select(self, kept: Sequence[int]) -> Rows:
        """The rows number `kept` of these."""
        return Rows(self.files, self.make, Numbers(np.array(self.picked, np.int64)[np.array(kept, np.int64)]))

    def place(self, i: int) -> str:
        """File and line, or file and row."""
        file, row = self.find(self.picked[i])
        return file.place(row)

    def find(self, number: int) -> tuple[TextFile, int]:
        """The file of a row, by its number over all files, and its number there."""
        at = bisect_right(self.ends, number)
        return self.files[at], number - (self.ends[at - 1] if at else 0)


def present(fields: object) -> Fields:
    """The fields of a row that are not null. Raises InvalidRow for what is no row."""
    if isinstance(fields, NotJSON):
        raise InvalidRow(fields.reason)
    if not isinstance(fields, dict):
        raise InvalidRow(f'expected an object such as {{"prompt": ...}}, found {type(fields).__name__}')
    return {name: value for name, value in fields.items() if value is not None} if None in fields.values() else fields


def read_rows(
    files: Sequence[Path],
    make: Callable[[Fields, TextFile, int], Fields],
    *,
    limit: int | None = None,
    key: str,
    depends: str | None = None,
) -> Rows:
    """The first `limit` rows of the files, each looked at. Raises one ConfigError for all that `make` finds wrong with them.

    make: (fields that are not null, the file, number of the row over all files) -> fields of the row, or InvalidRow.
    key: The option that names the files, for messages.
    depends: All that `make` depends on beside the row; rows that it has accepted once are then not looked at again. None: they are.
    """
    opened = [open_file(path) for path in files]
    total = sum(len(file.rows) for file in opened)
    rows = Rows(opened, make, range(total)[:limit])
    if depends is not None:
        rows.name = named(["rows", depends, limit, *((file.path.stem, file.path.suffix, file.digest) for file in opened)])
    if recall(rows.name) is None:
        complain(row_problems(rows), key=key)
        keep(rows.name, Verdict(), rows=total)
    if not rows:
        raise ConfigError(f"{key}: {listed([str(file) for file in files])} hold no rows")
    return rows


def row_problems(rows: Rows) -> list[str]:
    """Sentences about the rows that `make` refuses, and about every line that is not JSON, those behind the limit too."""
    problems: list[str] = []
    limit = len(rows)
    for file, end in zip(rows.files, rows.ends):
        first, size = end - len(file.rows), len(file.rows)
        looked_at = size if isinstance(file.rows, Lines) else min(size, max(0, limit - first))
        for row, fields in enumerate(islice(file.onward(0), looked_at)):
            if first + row < limit or isinstance(fields, NotJSON):
                try:
                    rows.make(present(fields), file, first + row)
                except InvalidRow as error:
                    problems.append(f"{file.place(row)}: {error}")
    return problems


def complain(problems: Sequence[str], *, key: str) -> None:
    """Raise ConfigError if there are problems; the first ten are named."""
    if problems:
        more = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        count = f"{len(problems)} row{'s' if len(problems) > 1 else ''} that cannot be used"
        raise ConfigError(f"{key}: {count}\n" + "\n".join(f"  {line}" for line in [*problems[:SHOWN], *more]))


def open_file(path: Path) -> TextFile:
    """The rows of a file, those of lines not yet read. Raises ConfigError for what is no text, no JSON or no Parquet."""
    if path.suffix == ".parquet":
        table = Parquet(path)
        return TextFile(path, table, table.digest)
    if path.suffix == ".json":
        text = read_text(path)
        try:
            content = parse_json(text)
        except json.JSONDecodeError as error:
            if error.msg != "Extra data":  # one object per line, as many files named .json hold
                raise ConfigError(f"{path}:{error.lineno}: not JSON ({error.msg} at column {error.colno})") from error
        else:
            if isinstance(content, list):
                return TextFile(path, content, xxhash.xxh3_128_hexdigest(text.encode()))
    lines = Lines(path, json_row)
    return TextFile(path, lines, lines.digest)
