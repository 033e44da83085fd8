"""Files of texts: found by name, folder or pattern, and told apart by split."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable
from pathlib import Path

from lit_rl.errors import ConfigError, listed

SUFFIXES = (".jsonl", ".json", ".parquet")


SPLIT_NAMES = {"train": ("train",), "val": ("val", "valid", "validation", "dev", "eval", "test")}
"""Words in the names of files that tell the splits of a folder apart; of several the first that is there."""


Paths = str | list[str]


def find_files(paths: Paths, *, split: str, key: str) -> list[Path]:
    """The files that a path, a folder, a pattern or a list of them name.

    split: "train", "val" or another word; of a folder whose files are named after splits only those of this one are taken.
    """
    found: list[Path] = []
    for text in [paths] if isinstance(paths, str) else paths:
        path = Path(text).expanduser()
        if path.is_dir():
            found += folder_files(path, split=split, key=key)
        elif path.is_file():
            found.append(path)
        elif matches := sorted(Path(match) for match in glob.glob(str(path), recursive=True)):
            found += matches
        else:
            raise ConfigError(f"{key}: {text}: no such file or folder, and no file that this pattern matches")
    for path in found:
        if path.suffix not in SUFFIXES:
            raise ConfigError(f"{key}: {path}: rows are read from {', '.join(SUFFIXES)} files")
    if not found:
        raise ConfigError(f"{key} is an empty list; name a file, a folder or a pattern such as data/*.parquet")
    return found


def folder_files(folder: Path, *, split: str, key: str) -> list[Path]:
    """The files of a folder, or those of one split where their names tell."""
    files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    if not files:
        raise ConfigError(f"{key}: {folder} holds no {', '.join(SUFFIXES)} file, only {listed(sorted(p.name for p in folder.iterdir()))}")
    named = split_files(files)
    if split not in SPLIT_NAMES or not named:
        return files
    if split not in named:
        raise ConfigError(f"{key}: no file in {folder} is named after {' or '.join(SPLIT_NAMES[split])}: {listed([p.name for p in files])}")
    return named[split]


def split_files(files: Iterable[Path]) -> dict[str, list[Path]]:
    """Files by the split that a word of their names says they are: train-00000-of-00001.parquet, gsm8k_test.jsonl."""
    words = {path: set(re.split("[^a-z]+", path.stem.lower())) for path in files}
    result: dict[str, list[Path]] = {}
    for split, names in SPLIT_NAMES.items():
        for name in names:
            if split not in result and (matching := [path for path, found in words.items() if name in found]):
                result[split] = matching
    return result
