"""A folder of checkpoints belongs to one run at a time: of two that write `last.ckpt`, nobody could say whose it is."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import tempfile
from collections.abc import Iterable
from pathlib import Path

from lit_rl.errors import ConfigError

_held: dict[Path, int] = {}


def claim(folders: Iterable[str | os.PathLike]) -> None:
    """Keep the folders, which are made if they are not there, for this process until `release` or its end, however it ends.

    Raises ConfigError if a folder cannot be written or another process keeps it. The lock is one of POSIX: forked children do not have it,
    and network file systems know it; where there is none, folders are not kept.
    """
    for folder in dict.fromkeys(Path(os.path.abspath(folder)) for folder in folders):
        _check_writable(folder)
        if folder not in _held and (descriptor := _lock(folder)) is not None:
            _held[folder] = descriptor


def release() -> None:
    """Give back all folders that this process has claimed."""
    for folder in list(_held):
        lock_file(folder).unlink(missing_ok=True)
        os.close(_held.pop(folder))


def lock_file(folder: Path) -> Path:
    """Beside the folder: inside it Lightning would warn of a folder that is not empty."""
    return folder.with_name(f".{folder.name}.run")


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"checkpoints cannot be written to {folder}: {error.strerror}; set run.dir to a folder that can be written"
        ) from error


def _lock(folder: Path) -> int | None:
    """A descriptor that holds the lock; None where there can be none."""
    file = lock_file(folder)
    while True:
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError:
            return None
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 200).decode(errors="replace").strip()
            os.close(descriptor)
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return None  # no locks on this file system
            raise ConfigError(
                f"another run ({holder or 'of another process'}) writes its checkpoints to {folder}: wait for its end, or give "
                "this one another --run.name"
            ) from error
        if file.exists() and os.path.samestat(os.fstat(descriptor), os.stat(file)):
            break
        os.close(descriptor)  # its last holder removed it in between
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return descriptor
