"""Rows of a text file, one a line, that stay on the disk: a place of eight bytes for each is all that memory holds."""

from __future__ import annotations

import io
import json
import os
from abc import abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar, overload

import numpy as np
import xxhash

from datamodules.text_encoding import MARKS, parse_json, read_text
from lit_rl.errors import ConfigError

T = TypeVar("T")

BLOCK = 4 << 20
"""Bytes that are read at a time."""


@dataclass(frozen=True)
class NotJSON:
    """The value of a line that has none. reason: A sentence without the line's place."""

    reason: str


def json_row(line: str) -> object:
    """The value of a line, as `json.loads` reads it, or `NotJSON`."""
    try:
        return parse_json(line)
    except json.JSONDecodeError as error:
        return NotJSON(f"not JSON ({error.msg} at column {error.colno}); each line must be one object")


class Stored(Sequence[T]):
    """Rows on the disk that are read in order many at a time, and one by one when asked for."""

    digest: str
    """It differs where the content of the file does."""

    @abstractmethod
    def onward(self, start: int) -> Iterator[T]:
        """The rows from number `start`."""

    @abstractmethod
    def at(self, i: int) -> T:
        """Row number `i`."""

    @overload
    def __getitem__(self, i: int) -> T: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[T]: ...
    def __getitem__(self, i: int | slice) -> T | Sequence[T]:
        numbers = range(len(self))
        return [self.at(k) for k in numbers[i]] if isinstance(i, slice) else self.at(numbers[i])

    def __iter__(self) -> Iterator[T]:
        return self.onward(0)


class Lines(Stored[T]):
    """The lines of a text file that are not blank, each as `parse` reads it.

    Opening reads the file once, for its encoding, the places of its lines and its `digest`; rows are read from the file afterwards, so a
    pickled copy is as small as these places. The file must not change meanwhile: another content is told as ConfigError. One that is not
    UTF-8 (UTF-16, UTF-32) stays in memory as UTF-8. Raises ConfigError as `read_text` does.
    """

    def __init__(self, path: Path, parse: Callable[[str], T]) -> None:
        self.path, self.parse = path, parse
        self._file: BinaryIO | None = None
        scan = _Scan()
        with self._opened() as file:
            self.stamp = _stamp(file)
            if not scan.read(file):
                read_text(path)  # which says what is wrong, and where
                raise ConfigError(f"{path}: was changed while it was read")
        self.digest, self.bounds, self.lines = scan.digest.hexdigest(), scan.bounds(), scan.lines()

    def __len__(self) -> int:
        return len(self.lines)

    def at(self, i: int) -> T:
        """Row number `i`."""
        first, last = self.bounds[line := self.lines[i]], self.bounds[line + 1]
        return self.parse(_text(self._read(int(first), int(last)), line))

    def onward(self, start: int) -> Iterator[T]:
        """The rows from number `start`, read many lines at a time."""
        bounds, lines, at = self.bounds, self.lines, start
        while at < len(lines):
            first = int(bounds[before := lines[at]])
            stop = int(np.searchsorted(bounds, first + BLOCK, side="right")) - 1  # the line that the block ends in front of
            stop = max(stop, before + 1)
            until = bisect_left(lines, stop, at)
            block, places = self._read(first, int(bounds[stop])), (bounds[before : stop + 1] - first).tolist()
            if block.isascii():  # decoded once for all lines, whose places are then the same
                text = block.decode()
                for line in lines[at:until]:
                    yield self.parse(text[places[line - before] : places[line - before + 1]].rstrip("\r\n"))
            else:
                for line in lines[at:until]:
                    yield self.parse(_text(block[places[line - before] : places[line - before + 1]], line))
            at = until

    def line(self, i: int) -> int:
        """The number, from 1, of row `i`'s line."""
        return int(self.lines[i]) + 1

    def first(self, count: int | None) -> Lines[T]:
        """The first rows, or all."""
        some = copy(self)
        some.lines = self.lines[:count]
        return some

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_file": None}

    def _opened(self) -> BinaryIO:
        try:
            with open(self.path, "rb") as file:
                marked = next((name for mark, name in MARKS if file.peek(4).startswith(mark)), "utf-8")
            return open(self.path, "rb") if marked == "utf-8" else io.BytesIO(read_text(self.path).encode())
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be read ({error.strerror or error})") from error

    def _read(self, first: int, last: int) -> bytes:
        """Bytes of the file. `pread`, as processes that were forked share one position; a memory map of a file that shrinks kills them."""
        if self._file is None:
            self._file = self._opened()
        if (stamp := _stamp(self._file)) != self.stamp:
            self._compare()
            self.stamp = stamp
        if isinstance(self._file, io.BytesIO):
            return bytes(self._file.getbuffer()[first:last])
        return os.pread(self._file.fileno(), last - first, first)

    def _compare(self) -> None:
        """Raise ConfigError unless the file holds what it held when it was opened."""
        scan = _Scan()
        with self._opened() as file:
            same = scan.read(file) and scan.digest.hexdigest() == self.digest
        if not same:
            raise ConfigError(f"{self.path}: was changed after it had been checked: start the run again, and leave the file while it runs")


class _Scan:
    """A look at each block of a file: the content's hash, where lines begin, and which of them are blank."""

    def __init__(self) -> None:
        self.digest = xxhash.xxh3_128()
        self.starts: list[np.ndarray] = []
        self.blank: list[int] = []
        self.size = self.count = 0

    def read(self, file: BinaryIO) -> bool:
        """False for bytes that are no text."""
        mark = b"\xef\xbb\xbf"
        while block := file.read(BLOCK):
            block += file.readline()
            self.digest.update(block)
            skipped = len(mark) if not self.size and block.startswith(mark) else 0
            try:
                block[skipped:].decode()
            except UnicodeDecodeError:
                return False
            if b"\0" in block:
                return False
            self._note(block, skipped)
            self.size += len(block)
        return True

    def _note(self, block: bytes, skipped: int) -> None:
        """Note the lines of a block, which ends with a line."""
        data = np.frombuffer(block, np.uint8)
        ends = data == 10
        if b"\r" in block:  # the end of a line, but in front of the other one
            ends |= (data == 13) & (np.append(data[1:], 0) != 10)
        after = np.flatnonzero(ends) + 1
        starts = np.concatenate([[skipped], after[after < len(data)]]).astype(np.int64)
        for i in np.flatnonzero(data[np.minimum(starts, len(data) - 1)] != ord("{")).tolist():
            stop = int(starts[i + 1]) if i + 1 < len(starts) else len(block)
            if not _text(block[int(starts[i]) : stop], self.count + i).strip():
                self.blank.append(self.count + i)
        self.starts.append(starts + self.size)
        self.count += len(starts)

    def bounds(self) -> np.ndarray:
        """Places of the lines' beginnings, and the file's size."""
        return np.concatenate([*self.starts, [self.size]]).astype(np.int64)

    def lines(self) -> Sequence[int]:
        """Numbers, from 0, of the lines that are not blank."""
        every = range(self.count)
        return every if not self.blank else Numbers(np.delete(np.arange(self.count), self.blank))


class Numbers(Sequence[int]):
    """Integers in eight bytes each."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    @overload
    def __getitem__(self, i: int) -> int: ...
    @overload
    def __getitem__(self, i: slice) -> Numbers: ...
    def __getitem__(self, i: int | slice) -> int | Numbers:
        return Numbers(self.values[i]) if isinstance(i, slice) else int(self.values[i])

    def __iter__(self) -> Iterator[int]:
        for first in range(0, len(self), 1 << 16):
            yield from self.values[first : first + (1 << 16)].tolist()


def _text(line: bytes, number: int) -> str:
    """A line without its end, and without the mark of a file that was appended to others."""
    text = line.decode().rstrip("\r\n")
    return text.removeprefix("\ufeff") if number else text


def _stamp(file: BinaryIO) -> tuple[int, ...]:
    """It changes where somebody writes into the file, or puts another one in its place."""
    if isinstance(file, io.BytesIO):
        return (id(file),)
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns, found.st_ino
