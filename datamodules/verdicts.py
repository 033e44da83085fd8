"""Findings about all rows of a data set, kept between runs: a row is parsed and tokenized at the first start and not at those after it.

A finding is named by a hash of all that it depends on: the content of the files, the options of the datamodule, the tokenizer and the
template, and the sources that look at rows. So it is never out of date; whoever removes it loses time alone.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TextIO

from lit_rl.checkpoints.replacing import atomic_file

log = logging.getLogger(__name__)

FOLDER = "LIT_RL_CACHE"
"""The environment's variable that names the folder; an empty one keeps nothing."""

WORTH = 1000
"""Rows from which on a finding is kept."""

SOURCES = ("datamodules", "lit_rl/policies", "lit_rl/errors.py")
PACKAGES = ("transformers", "tokenizers", "jinja2", "pyarrow", "datasets")


@dataclass
class Verdict:
    """Findings about the rows of a split. left_out: Rows by the reason. max_tokens: Tokens of the longest row, by kind."""

    left_out: dict[str, list[int]] = field(default_factory=dict)
    max_tokens: dict[str, int] = field(default_factory=dict)

    def add(self, other: Verdict) -> None:
        """Take over what is known of further rows."""
        for reason, rows in other.left_out.items():
            self.left_out[reason] = [*self.left_out.get(reason, []), *rows]
        for kind, tokens in other.max_tokens.items():
            self.max_tokens[kind] = max(tokens, self.max_tokens.get(kind, 0))


def named(parts: Iterable[object]) -> str:
    """The name of a finding that depends on these values and on our own sources."""
    return hashlib.sha256(repr((code_version(), *parts)).encode()).hexdigest()[:32]


@cache
def code_version() -> str:
    """It differs where a source or a library that looks at rows does."""
    root = Path(__file__).resolve().parent.parent
    files = [file for name in SOURCES for file in ([root / name] if name.endswith(".py") else sorted((root / name).rglob("*.py")))]
    return hashlib.sha256(repr([file.read_bytes() for file in files] + [version(name) for name in PACKAGES]).encode()).hexdigest()


def folder() -> Path | None:
    """The folder of findings; None where there is none to be."""
    given = os.environ.get(FOLDER)
    if given is None:
        given = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "lit_rl")
    place = os.path.expanduser(given)
    return None if not place or place.startswith("~") else Path(place) / "rows"


def recall(name: str | None) -> Verdict | None:
    """A finding that was kept."""
    place = folder()
    if name is None or place is None:
        return None
    try:
        return Verdict(**json.loads((place / f"{name}.json").read_bytes()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        log.info("%s is not used: %s", place / f"{name}.json", error)
        return None


@contextmanager
def alone(name: str, *, rows: int) -> Iterator[None]:
    """One process of this machine at a time looks at so many rows; those that waited find what it kept. In a read-only home all look."""
    lock = _lock(name) if rows >= WORTH else None
    if lock is None:
        yield
        return
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # ends with the process, however that ends
        try:
            yield
        finally:
            Path(lock.name).unlink(missing_ok=True)


def _lock(name: str) -> TextIO | None:
    """The file that stands for a look at the rows of a finding; None where none can be written."""
    try:
        if (place := folder()) is None:
            return None
        place.mkdir(parents=True, exist_ok=True)
        return open(place / f"{name}.lock", "w")
    except OSError:
        return None


def keep(name: str | None, verdict: Verdict, *, rows: int) -> None:
    """Keep a finding about so many rows. In a folder that nobody can write to it is not kept, and the log says so."""
    place = folder()
    if name is None or place is None or rows < WORTH:
        return
    try:
        place.mkdir(parents=True, exist_ok=True)
        with atomic_file(place / f"{name}.json") as file:
            file.write(json.dumps(asdict(verdict)).encode())
    except OSError as error:
        log.info("the next start will look at all rows again, as nothing can be kept in %s: %s. Set %s to a folder", place, error, FOLDER)
