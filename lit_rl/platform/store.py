"""The service's database: one SQLite file, one writer at a time, readers that never wait."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa

from lit_rl.platform.schema import migrate

BUSY_SECONDS = 5.0
"""Time for which a writer waits for another program's."""

NETWORK_FILESYSTEMS = ("nfs", "nfs4", "cifs", "smb3", "fuse.sshfs", "lustre")


class Store:
    """The database of a data folder, in WAL mode: what is written survives the end of this process, at any moment.

    Raises ValueError where the folder is on a network file system, on which SQLite's locks do not hold, for a later release's file, and
    for one that is damaged, held by another program or not to be written.
    """

    def __init__(self, folder: Path) -> None:
        kind = filesystem_of(folder)
        if kind in NETWORK_FILESYSTEMS:
            raise ValueError(f"--data {folder} is on {kind}, where SQLite's locks do not hold: choose a folder on a local disk")
        self.path = folder / "platform.db"
        self._engine = sa.create_engine(
            f"sqlite:///{self.path}", connect_args={"timeout": BUSY_SECONDS, "check_same_thread": False}, pool_size=16, max_overflow=48
        )
        self._writing = threading.Lock()
        sa.event.listen(self._engine, "connect", _prepare)
        sa.event.listen(self._engine, "begin", _begin)
        try:
            with self.write() as connection:
                migrate(connection)
        except sa.exc.DatabaseError as error:
            self._engine.dispose()
            raise ValueError(f"{self.path}: {_cause(error)}") from error

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """A transaction; all of it is written or, where the block raises, none."""
        with self._writing, self._engine.connect().execution_options(writes=True) as connection, connection.begin():
            yield connection

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """A view of the database at one moment."""
        with self._engine.connect() as connection:
            yield connection

    def backup(self, target: Path) -> None:
        """A copy of the database as it is now, made while others read and write."""
        with self._engine.connect() as connection, sqlite3.connect(target) as copy:
            source = connection.connection.driver_connection
            assert isinstance(source, sqlite3.Connection)
            source.backup(copy)
        copy.close()

    def close(self) -> None:
        """Wait for the writer, then close the file."""
        with self._writing:
            self._engine.dispose()


def _cause(error: sa.exc.DatabaseError) -> str:
    """The reason why a database does not open, and the way out."""
    said = str(error.orig)
    if "locked" in said:
        return f"{said}: another program holds the file, such as a shell of sqlite3; end it, then start again"
    if "full" in said or "readonly" in said or "unable to open" in said:
        return f"{said}: make room on the disk, or let this user write there"
    return f"{said}: the file is damaged; move it away and put a copy from /api/backup in its place, or begin with an empty folder"


def _prepare(connection: sqlite3.Connection, _: object) -> None:
    connection.isolation_level = None  # transactions begin where `_begin` says, not where the driver guesses
    for pragma in ("journal_mode = WAL", "synchronous = NORMAL", "foreign_keys = ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: sa.Connection) -> None:
    writes = connection.get_execution_options().get("writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def filesystem_of(folder: Path, mounts: Path = Path("/proc/mounts")) -> str:
    """The kind of file system that a folder is on; "" where the system does not tell."""
    best, kind = "", ""
    for line in mounts.read_text().splitlines() if mounts.exists() else []:
        _, place, found, *_ = line.split()
        if folder.resolve().is_relative_to(place) and len(place) >= len(best):
            best, kind = place, found
    return kind
