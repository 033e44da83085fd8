"""Rows from JSONL, JSON and Parquet files: checked all at once before training, given out one by one."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, overload

from datamodules.text_encoding import parse_json, read_text
from lit_rl.errors import ConfigError, listed
from lit_rl.types import Info

if TYPE_CHECKING:
    from pyarrow import DataType

SHOWN = 10
"""Problems named in one message."""

Fields = dict[str, object]


class InvalidRow(ConfigError):
    """A row that cannot be used: its field, its value and the expected one."""


@dataclass(frozen=True)
class TextFile:
    """The rows of one file, unchecked, and where they stand in it."""

    path: Path
    rows: Sequence[object]
    lines: Sequence[int] | None  # None: rows are counted, from 1

    def place(self, i: int) -> str:
        """File and line, or row, of row `i`."""
        return f"{self.path}:{self.lines[i]}" if self.lines is not None else f"{self.path}: row {i + 1}"


class Rows(Sequence[Info]):
    """Rows of several files as read-only mappings, made when asked for; those of Parquet stay on the disk until then.

    picked: Numbers of the rows over all files, rising.
    """

    def __init__(self, files: Sequence[TextFile], make: Callable[[Fields, str, int], Fields], picked: Sequence[int]) -> None:
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
        file, row = self._find(self.picked[i])
        return MappingProxyType(self.make(present(file.rows[row]), file.path.stem, self.picked[i]))

    def __iter__(self) -> Iterator[Info]:
        return (MappingProxyType(self.make(present(fields), stem, number)) for fields, stem, number in self.raw())

    def raw(self) -> Iterator[tuple[object, str, int]]:
        """Fields as they stand in the file, its name and the row's number over all files: read many at a time."""
        numbers = iter(self.picked)
        wanted = next(numbers, None)
        for file, end in zip(self.files, self.ends):
            for number, fields in enumerate(file.rows, start=end - len(file.rows)):
                if wanted is None:
                    return
                if number == wanted:
                    yield fields, file.path.stem, number
                    wanted = next(numbers, None)

    def select(self, kept: Sequence[int]) -> Rows:
        """The rows number `kept` of these."""
        return Rows(self.files, self.make, [self.picked[i] for i in kept])

    def place(self, i: int) -> str:
        """File and line, or file and row."""
        file, row = self._find(self.picked[i])
        return file.place(row)

    def _find(self, number: int) -> tuple[TextFile, int]:
        at = bisect_right(self.ends, number)
        return self.files[at], number - (self.ends[at - 1] if at else 0)


def present(fields: object) -> Fields:
    """The fields of a row that are not null. Raises InvalidRow for what is no row."""
    if not isinstance(fields, dict):
        raise InvalidRow(f'expected an object such as {{"prompt": ...}}, found {type(fields).__name__}')
    return {name: value for name, value in fields.items() if value is not None}


def read_rows(files: Sequence[Path], make: Callable[[Fields, str, int], Fields], *, limit: int | None = None, key: str) -> Rows:
    """The first `limit` rows of the files, each looked at. Raises one ConfigError for all that `make` finds wrong with them.

    make: (fields that are not null, the file's name without suffix, number of the row over all files) -> fields of the row, or InvalidRow.
    key: The option that names the files, for messages.
    """
    problems: list[str] = []
    opened = [open_file(path, problems) for path in files]
    total = sum(len(file.rows) for file in opened)
    rows = Rows(opened, make, range(total)[:limit])
    for i, (fields, stem, number) in enumerate(rows.raw()):
        try:
            make(present(fields), stem, number)
        except InvalidRow as error:
            problems.append(f"{rows.place(i)}: {error}")
    complain(problems, key=key)
    if not rows:
        raise ConfigError(f"{key}: {listed([str(file) for file in files])} hold no rows")
    return rows


def complain(problems: Sequence[str], *, key: str) -> None:
    """Raise ConfigError if there are problems; the first ten are named."""
    if problems:
        more = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        count = f"{len(problems)} row{'s' if len(problems) > 1 else ''} that cannot be used"
        raise ConfigError(f"{key}: {count}\n" + "\n".join(f"  {line}" for line in [*problems[:SHOWN], *more]))


def open_file(path: Path, problems: list[str]) -> TextFile:
    """The rows of a file; lines that are not JSON become problems."""
    if path.suffix == ".parquet":
        return TextFile(path, _Parquet(path), None)
    text = read_text(path)
    if path.suffix == ".json":
        try:
            content = parse_json(text)
        except json.JSONDecodeError as error:
            if error.msg != "Extra data":  # one object per line, as many files named .json hold
                raise ConfigError(f"{path}:{error.lineno}: not JSON ({error.msg} at column {error.colno})") from error
        else:
            if isinstance(content, list):
                return TextFile(path, content, None)
    numbered = list(_lines(path, text, problems))
    return TextFile(path, [row for _, row in numbered], [number for number, _ in numbered])


def _lines(path: Path, text: str, problems: list[str]) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines() would cut texts at U+2028
        if line.strip():
            try:
                yield number, parse_json(line)
            except json.JSONDecodeError as error:
                problems.append(f"{path}:{number}: not JSON ({error.msg} at column {error.colno}); each line must be one object")


CONVERSED = ("tools", "role")
"""A column of this name, or of messages, which have this field, goes to a chat template."""


def without_union(value: object, kind: DataType) -> object:
    """A value of a table's column without the keys that only other rows have.

    A column of objects holds every key that any row has, null where a row has none. A null that is a row's own looks the same: it is kept
    where nothing else is missing from the object and no row has another value for it. kind: The column's type of pyarrow; what is kept
    as JSON text has no such keys.
    """
    import pyarrow.types as types

    if isinstance(value, list) and (types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)):
        return [without_union(item, kind.value_type) for item in value]
    if not isinstance(value, dict) or not types.is_struct(kind):
        return value
    parts = {field.name: field.type for field in kind}
    known = {name: item for name, item in value.items() if item is not None}
    own = all(item is not None or types.is_null(parts.get(name)) for name, item in value.items()) and bool(known)
    return {name: without_union(item, parts[name]) for name, item in (value if own else known).items()}


def _conversed(name: str, kind: DataType) -> bool:
    import pyarrow.types as types

    inner = kind.value_type if types.is_list(kind) or types.is_large_list(kind) else kind
    return name == CONVERSED[0] or (types.is_struct(inner) and inner is not kind and inner.get_field_index(CONVERSED[1]) >= 0)


class _Parquet(Sequence[object]):
    """Rows of a table; in order they are read `CHUNK` at a time, which is many times as fast."""

    CHUNK = 1000

    def __init__(self, path: Path) -> None:
        import pyarrow
        import pyarrow.parquet
        from datasets import Dataset

        try:
            table = pyarrow.parquet.read_table(path, memory_map=True)
            self.table = Dataset(table)
        except pyarrow.ArrowInvalid as error:
            raise ConfigError(f"{path}: not a Parquet file: {error}") from error
        self.unions = {field.name: field.type for field in table.schema if _conversed(field.name, field.type)}

    def __len__(self) -> int:
        return len(self.table)

    @overload
    def __getitem__(self, i: int) -> object: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[object]: ...
    def __getitem__(self, i: int | slice) -> object:
        return self._own(self.table[i])

    def _own(self, row: dict[str, object]) -> dict[str, object]:
        return {name: without_union(value, self.unions[name]) if name in self.unions else value for name, value in row.items()}

    def __iter__(self) -> Iterator[object]:
        for first in range(0, len(self), self.CHUNK):
            columns = self.table[first : first + self.CHUNK]
            yield from (self._own(dict(zip(columns, values))) for values in zip(*columns.values()))
