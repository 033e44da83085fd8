"""Paths that somebody else wrote: nothing about them can fail, whatever their length, their owner or their letters."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

MOST_FILES = 10_000
"""Files of a folder that are counted for its size."""


def place_of(root: Path, text: str) -> Path:
    """The path of a text, relative ones below `root`. `~name` of a user that does not exist is an ordinary name."""
    try:
        return root / Path(text).expanduser()
    except RuntimeError:
        return root / text


def there(path: Path) -> bool:
    """True for a path at which this user can see something; a name that no file can have has nothing."""
    try:
        return path.exists()
    except OSError:
        return False


def file_below(folder: Path, path: Path) -> Path | None:
    """The file at a path, links followed, where it lies in a folder; else None."""
    try:
        found = path.resolve()
        return found if found.is_relative_to(folder.resolve()) and found.is_file() else None
    except OSError:
        return None


def size_of(path: Path) -> int | None:
    """Bytes of a file, or of the files of a folder; None where there is nothing, or where a folder has more than `MOST_FILES` files."""
    sizes = list(islice(_sizes(path), MOST_FILES + 1)) if there(path) else []
    return sum(sizes) if there(path) and len(sizes) <= MOST_FILES else None


def modified(path: Path) -> float:
    """Returns the time of a file's last change, in seconds since 1970; 0 where it is gone by now."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def utf8(path: Path) -> bool:
    """True for a name that JSON can carry: file systems take any bytes."""
    return str(path).isprintable() or not any("\ud800" <= letter <= "\udfff" for letter in str(path))


def _sizes(path: Path) -> Iterator[int]:
    """Sizes of the files at and below a path; files may come and go meanwhile."""
    entries = (Path(folder, name) for folder, _, names in os.walk(path) for name in names)
    for entry in [path] if path.is_file() else entries:
        try:
            yield entry.stat().st_size
        except OSError:
            yield 0
