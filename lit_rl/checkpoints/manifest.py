"""Sizes and checksums of a checkpoint, written last: what changed on its way back, by one bit, is not read.

A folder has `manifest.json`. A single file ends in its own checksum, as the comment of the zip archive that it is: no reader minds, and it
cannot be lost by copying. Older ones have neither; of those the CRC32 of the zip archives is compared, which covers less.
"""

from __future__ import annotations

import io
import json
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO

import xxhash

MANIFEST = "manifest.json"
BLOCK = 1 << 22
ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, struct.error, NotImplementedError, RuntimeError, EOFError, ValueError)
"""Errors that `zipfile` raises for archives with wrong bits, depending on where the bits are."""
_END = b"PK\x05\x06"  # of a zip archive: this, 16 bytes, the length of the comment in 2, the comment
_END_SIZE = 22
_SEAL = b"xxh3_64="
_SEAL_SIZE = len(_SEAL) + 16

Entries = dict[str, list[object]]
"""[bytes, xxh3_64] by the file's path in the folder."""


# ---------------------------------------------------------------------- single files
class SealedFile:
    """A binary file for writing one zip archive from its beginning to its end, to which `seal` adds the checksum."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self._digest = xxhash.xxh3_64()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        """torch raises an error of its own about what was not written; the reason stays in `error`."""
        self._digest.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        """Flush the file."""
        self.file.flush()

    def seal(self) -> None:
        """The checksum is that of the archive without a comment."""
        self.file.seek(-2, os.SEEK_END)
        self.file.write(_SEAL_SIZE.to_bytes(2, "little"))
        self.file.write(_SEAL + self._digest.hexdigest().encode())


def has_checksums(checkpoint: Path) -> bool:
    """Earlier releases wrote none."""
    if checkpoint.is_dir():
        return (checkpoint / MANIFEST).is_file()
    with open(checkpoint, "rb") as stream:
        return not _tail(stream)[-_END_SIZE:].startswith(_END)


def damage(file: Path) -> str | None:
    """The damage of a zip archive, or None. Reads all of it."""
    with open(file, "rb") as stream:
        tail = _tail(stream)
        size = stream.seek(0, os.SEEK_END)
        if tail[-_END_SIZE:].startswith(_END):
            return _crc_damage(file)  # of an older release
        end, seal = tail[: -_SEAL_SIZE or None], tail[-_SEAL_SIZE:]
        if not end.startswith(_END) or end[-2:] != _SEAL_SIZE.to_bytes(2, "little") or not seal.startswith(_SEAL):
            return f"is damaged ({file.name}, {size} bytes, does not end in its checksum)"
        found = _digest(stream, size - _SEAL_SIZE - 2, then=b"\0\0")
    return None if found.encode() == seal.removeprefix(_SEAL) else f"is damaged ({file.name} has another content than was written)"


def _tail(stream: IO[bytes]) -> bytes:
    size = stream.seek(0, os.SEEK_END)
    stream.seek(max(0, size - _END_SIZE - _SEAL_SIZE))
    return stream.read()


def _crc_damage(file: Path) -> str | None:
    with open(file, "rb") as stream:
        return _zip_damage(stream, file.name)


def _zip_damage(stream: IO[bytes], name: str) -> str | None:
    try:
        with zipfile.ZipFile(stream) as archive:
            torn = archive.testzip()
    except ZIP_ERRORS as error:
        return f"is damaged ({name}: {error})"
    return torn and f"is damaged ({torn} in {name} has another content than was written)"


# ---------------------------------------------------------------------- folders
def entries(folder: Path, rank: int, size: int) -> Entries:
    """Sizes and checksums of the files that process `rank` of `size` has written. Flushes them.

    Names tell the process; files without a rank in their name are the first one's.
    """
    found: Entries = {}
    for path in files_of(folder):
        named = re.search(r"(?:^|/)(?:__|[a-z0-9]*_?zero_pp_rank_)(\d+)_", path)
        if (int(named[1]) % size if named else 0) == rank:
            with open(folder / path, "rb") as stream:
                os.fsync(stream.fileno())
                found[path] = [os.fstat(stream.fileno()).st_size, _digest(stream)]
    return found


def files_of(folder: Path) -> list[str]:
    """Names of all files in a folder but its manifest, sorted."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


def write_manifest(folder: Path, found: Iterable[Mapping[str, Sequence[object]]]) -> None:
    """Put the entries of all processes together; the last thing that is written into a folder."""
    together = {path: list(entry) for part in found for path, entry in sorted(part.items())}
    with open(folder / MANIFEST, "w", encoding="utf-8") as stream:
        json.dump({"files": together, "xxh3_64": _digest_of(together)}, stream, indent=0)
        stream.flush()
        os.fsync(stream.fileno())


def read_manifest(folder: Path) -> Entries | None:
    """None in a folder of an older release. Raises ValueError when it is not as it was written."""
    try:
        found = json.loads((folder / MANIFEST).read_bytes())
        if found.keys() != {"files", "xxh3_64"} or _digest_of(found["files"]) != found["xxh3_64"]:
            raise ValueError
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"is damaged ({MANIFEST} has another content than was written)") from error
    return found["files"]


def missing_files(folder: Path) -> str | None:
    """The files of a folder's manifest that are missing or have another length, as a sentence, or None. Reads no contents."""
    try:
        wanted = read_manifest(folder) or {}
    except ValueError as error:
        return str(error)
    for path, (size, _) in wanted.items():
        if not (folder / path).is_file():
            return f"lacks {path}"
        if (there := (folder / path).stat().st_size) != size:
            return f"is damaged ({path} has {there} bytes of {size})"
    return None


def file_damage(file: Path) -> str | None:
    """The difference between a single file and its folder's manifest, or None (also without a manifest)."""
    try:
        wanted = (read_manifest(file.parent) or {}).get(file.name)
    except ValueError as error:
        return str(error)
    if wanted is None:
        return None
    with open(file, "rb") as stream:
        there = [os.fstat(stream.fileno()).st_size, _digest(stream)]
    return None if there == wanted else f"is damaged (it has another content than was written, {there[0]} bytes of {wanted[0]})"


def folder_damage(folder: Path, rank: int = 0, size: int = 1) -> str | None:
    """The damage of the files that process `rank` of `size` reads, or None."""
    if missing := missing_files(folder):
        return missing
    wanted = read_manifest(folder)
    if wanted is None:
        return _damage_of_old(folder, rank, size)
    for path in list(wanted)[rank::size]:
        with open(folder / path, "rb") as stream:
            if _digest(stream) != wanted[path][1]:
                return f"is damaged ({path} has another content than was written)"
    return None


def _damage_of_old(folder: Path, rank: int, size: int) -> str | None:
    """Files of torch are zip archives; FSDP2's shards one for each tensor behind one another."""
    from lit_rl.checkpoints.restricted import METADATA_FILE, read_metadata

    files = [path for path in files_of(folder) if path.endswith(".pt")]
    for path in files[rank::size]:
        if problem := _crc_damage(folder / path):
            return problem
    places = list(read_metadata(folder).storage_data.values()) if (folder / METADATA_FILE).is_file() else []
    for place in places[rank::size]:
        if problem := _slice_damage(folder / place.relative_path, place.offset, place.length):
            return problem
    return None


def _slice_damage(file: Path, offset: int, length: int) -> str | None:
    if not file.is_file():
        return f"lacks {file.name}"
    with open(file, "rb") as stream:
        stream.seek(offset)
        content = stream.read(length)
    return _zip_damage(io.BytesIO(content), file.name)


# ---------------------------------------------------------------------- checksums
def _digest(stream: IO[bytes], length: int | None = None, *, then: bytes = b"") -> str:
    """xxh3_64 of the first `length` bytes (None = all) and of what follows them."""
    digest, left = xxhash.xxh3_64(), length
    stream.seek(0)
    while left != 0 and (block := stream.read(BLOCK if left is None else min(BLOCK, left))):
        digest.update(block)
        left = None if left is None else left - len(block)
    digest.update(then)
    return digest.hexdigest()


def _digest_of(files: Entries) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(files, sort_keys=True).encode())
