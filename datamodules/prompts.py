"""Prompts from files: .txt, .jsonl, or a folder with both splits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType

from datamodules.base import PromptDataModule
from datamodules.text_encoding import parse_json, read_text
from lit_rl.errors import ConfigError
from lit_rl.types import Info

SUFFIXES = (".txt", ".jsonl")


class PromptFiles(PromptDataModule):
    """Prompts from one file per split, or from a folder that holds `train.*` and `test.*` (or `val.*`).

    Args:
        train: `.txt` (a prompt per line), `.jsonl` (objects with the key `prompt`; the rest is kept for rewards), or such a folder.
        val: Held-out prompts, likewise; with a folder as `train`, its `test.*` or `val.*` unless given.
        predict: What `predict` renders; default: the held-out prompts.
        prompt_key: Name of the prompt in `.jsonl` files.
        max_train: Train on only so many prompts, from the start.
        max_val: Evaluate on only so many prompts, from the start.
        eval_batch_size, shuffle, seed: See `PromptDataModule`.
    """

    def __init__(
        self,
        train: str | None = None,
        val: str | None = None,
        predict: str | None = None,
        *,
        prompt_key: str = "prompt",
        max_train: int | None = None,
        max_val: int | None = None,
        eval_batch_size: int = 8,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        if train is not None and Path(train).expanduser().is_dir():
            folder = Path(train).expanduser()
            train = str(_split_file(folder, "train"))
            val = val or str(_split_file(folder, "test", "val"))
        splits = [_placed_prompts(Path(p), prompt_key=prompt_key) if p else {} for p in (train, val, predict)]
        rows = [list(split.values()) for split in splits]
        super().__init__(rows[0][:max_train], rows[1][:max_val], rows[2], eval_batch_size=eval_batch_size, shuffle=shuffle, seed=seed)
        self._places = [list(split) for split in splits[:2]]

    def rows_to_score(self, stage: str) -> Iterator[Info]:
        """As of the parent, each row with its file and line as `where`."""
        for places, rows in zip(self._places, (self.train_prompts if stage == "fit" else (), self.held_out), strict=True):
            yield from ({**row, "where": place} for place, row in zip(places, rows, strict=False))  # max_train cuts the rows


def read_prompts(path: Path, *, prompt_key: str = "prompt") -> list[Info]:
    """The prompts of a .txt or .jsonl file, in order; raises ValueError with file and line for the first row that is not one."""
    return list(_placed_prompts(path, prompt_key=prompt_key).values())


def _placed_prompts(path: Path, *, prompt_key: str) -> dict[str, Info]:
    """The same by file and line."""
    path = path.expanduser()
    if not path.exists():
        raise ConfigError(f"{path}: no such file or folder")
    if path.suffix not in SUFFIXES or path.is_dir():
        raise ConfigError(f"{path}: prompts are read from {' or '.join(SUFFIXES)} files")
    rows: dict[str, Info] = {}
    for number, line in enumerate(read_text(path).split("\n"), start=1):  # splitlines() would cut at U+2028
        if line.strip():
            where = f"{path}:{number}"
            rows[where] = _row(line, where, prompt_key) if path.suffix == ".jsonl" else MappingProxyType({"prompt": line.strip()})
    if not rows:
        raise ConfigError(f"{path}: holds no prompts")
    return rows


def _row(line: str, where: str, prompt_key: str) -> Info:
    try:
        row = parse_json(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: not JSON ({error.msg} at column {error.colno}); each line must be one object") from error
    if not isinstance(row, dict):
        raise ConfigError(f'{where}: expected an object such as {{"{prompt_key}": ...}}, found {type(row).__name__}')
    if not isinstance(row.get(prompt_key), str) or not row[prompt_key].strip():
        raise ConfigError(f"{where}: key {prompt_key!r} must be a non-empty string; found {sorted(row)}; see data.prompt_key")
    return MappingProxyType(row | {"prompt": row[prompt_key]})


def _split_file(folder: Path, *names: str) -> Path:
    for name in names:
        for suffix in SUFFIXES:
            if (folder / f"{name}{suffix}").is_file():
                return folder / f"{name}{suffix}"
    found = sorted(p.name for p in folder.iterdir())
    raise ConfigError(f"{folder}: needs {' or '.join(f'{n}{s}' for n in names for s in SUFFIXES)}; found {found}")
