"""One checkpoint takes the place of another: whenever a process is killed, a whole one stands there, or beside it and is found.

While it is written it is `.NAME.HOST-PID-N.new`. A folder that it replaces is `.NAME.HOST-PID-N.old` between two renames, as folders cannot
be replaced in one. `recovered` ends what was broken off.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import psutil

_count = itertools.count()

Whole = Callable[[Path], bool]


def beside(target: Path) -> Path:
    """A hidden name for what will be `target`, which no other process and no other thread uses."""
    return target.with_name(f".{target.name}.{_host()}-{os.getpid()}-{next(_count)}.new")


@contextmanager
def atomic_file(target: Path) -> Iterator[IO[bytes]]:
    """A binary file for writing that appears under its name only when the block ends without an exception."""
    temporary = beside(target)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        put_in_place(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def naming(target: Path) -> Iterator[None]:
    """Gives an error of the disk the name of the checkpoint that it prevents: what failed to be written has no name, or a hidden one."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(target)) from error


def put_in_place(new: Path, target: Path) -> None:
    """Rename the whole file or folder `new` to `target`, and remove what stood there."""
    old = None
    try:
        os.replace(new, target)
    except OSError:  # a folder, or something else than a folder where one is to stand
        if not os.path.lexists(target) or not os.path.lexists(new):
            raise
        old = new.with_suffix(".old")
        os.rename(target, old)
        try:
            os.rename(new, target)
        except OSError:
            if os.path.lexists(new):
                os.rename(old, target)
                raise
            if not os.path.lexists(target):
                raise
            # Another process that looked for a checkpoint right now has found neither, and put the new one there itself.
    sync_folder(target.parent)
    if old is not None:
        remove(old)


def recovered(target: Path, whole: Whole) -> bool:
    """Put what was left beside `target` in its place where nothing stands there; True if that was done.

    Several processes may do so at a time. whole: Tells whether a path holds a whole checkpoint.
    """
    if os.path.lexists(target):
        return False
    for leftover in sorted((path for path in leftovers(target) if whole(path)), key=_newest_first):
        with suppress(OSError):  # another process was faster
            os.rename(leftover, target)
            return True
        if os.path.lexists(target):
            return False
    return False


def swept(target: Path, whole: Whole) -> None:
    """Remove what ended processes have left beside `target`, but nothing whole as long as what stands there is not."""
    found = [path for path in leftovers(target) if not _in_use(path)]
    there = bool(found) and whole(target)
    for path in found:
        if there or not whole(path):
            remove(path)


def leftovers(target: Path) -> list[Path]:
    """Files and folders left beside `target`, by earlier releases too."""
    pattern = re.compile(rf"\.{re.escape(target.name)}(\.\w+-\d+-\d+)?\.(new|old|tmp)")
    with suppress(FileNotFoundError, NotADirectoryError):
        return [target.with_name(name) for name in os.listdir(target.parent) if pattern.fullmatch(name)]
    return []


def left_targets(folder: Path) -> set[Path]:
    """The checkpoints of a folder beside which something was left."""
    pattern = re.compile(r"\.(.+?\.ckpt)(\.\w+-\d+-\d+)?\.(new|old|tmp)")
    with suppress(FileNotFoundError, NotADirectoryError):
        return {folder / match[1] for name in os.listdir(folder) if (match := pattern.fullmatch(name))}
    return set()


def remove(path: Path) -> None:
    """A file, a link or a folder, as far as it can be removed: what stays is removed another time."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def sync_folder(folder: Path) -> None:
    """fsync a folder, so that a rename in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _newest_first(path: Path) -> tuple[bool, float]:
    """Sort key: the checkpoint that was about to take the place is newer than the one that stood there."""
    return path.suffix == ".old", -path.stat().st_mtime


def _in_use(path: Path) -> bool:
    """By a process of this machine that lives; of another machine nobody knows, so what is younger than a day is left alone."""
    made = re.search(r"\.(\w+)-(\d+)-\d+\.\w+$", path.name)
    if made is None:
        return False
    try:
        written = path.lstat().st_mtime
    except FileNotFoundError:
        return True  # until now
    if made[1] != _host():
        return time.time() - written < 86400
    try:
        return psutil.Process(int(made[2])).create_time() <= written  # else the number is another process's by now
    except psutil.Error:
        return False


def _host() -> str:
    return re.sub(r"\W", "_", socket.gethostname())
