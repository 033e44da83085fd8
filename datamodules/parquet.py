"""Rows of Parquet files: objects without the keys of other rows, images as the bytes of their files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from datamodules.lines import Stored
from lit_rl.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset
    from pyarrow import DataType

Fields = dict[str, object]

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


def _undecoded(feature: object) -> object:
    """A type of `datasets` by which images stay the bytes of their files."""
    from datasets import Image, List

    if isinstance(feature, dict):
        return {name: _undecoded(part) for name, part in feature.items()}
    if isinstance(feature, List):
        return List(_undecoded(feature.feature), length=feature.length)
    return Image(decode=False) if isinstance(feature, Image) else feature


class Parquet(Stored[object]):
    """Rows of a table; in order they are read `CHUNK` at a time, which is many times as fast. A pickled copy reads the file again."""

    CHUNK = 1000

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "rb") as file:
            self.digest = hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
        self.size = len(self.table)

    @cached_property
    def table(self) -> Dataset:
        """The rows, in Arrow's memory."""
        import pyarrow
        import pyarrow.parquet
        from datasets import Dataset, DatasetInfo, Features

        try:
            table = pyarrow.parquet.read_table(self.path, memory_map=True)
            told = Dataset(table).features
            return Dataset(table, info=DatasetInfo(features=Features({name: _undecoded(part) for name, part in told.items()})))
        except pyarrow.ArrowInvalid as error:
            raise ConfigError(f"{self.path}: not a Parquet file: {error}") from error

    @cached_property
    def unions(self) -> dict[str, DataType]:
        """Types of the columns whose objects hold keys of other rows."""
        return {field.name: field.type for field in self.table.data.schema if _conversed(field.name, field.type)}

    def __len__(self) -> int:
        return self.size

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "table"}

    def at(self, i: int) -> object:
        """Row number `i`."""
        return self._own(self.table[i])

    def onward(self, start: int) -> Iterator[object]:
        """The rows from number `start`."""
        for first in range(start, len(self), self.CHUNK):
            columns = self.table[first : first + self.CHUNK]
            yield from (self._own(dict(zip(columns, values))) for values in zip(*columns.values()))

    def _own(self, row: Fields) -> Fields:
        return {name: without_union(value, self.unions[name]) if name in self.unions else value for name, value in row.items()}
