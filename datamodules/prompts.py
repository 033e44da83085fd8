"""Prompts from files: .txt, .jsonl, or a folder with both splits."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import MappingProxyType

from datamodules.base import PromptDataModule
from datamodules.lines import Lines, NotJSON, json_row
from datamodules.text_files import InvalidRow
from datamodules.verdicts import Verdict, alone, keep, named, recall
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
        limits = ((train, max_train), (val, max_val), (predict, None))
        rows = [_prompts(Path(path), prompt_key=prompt_key).first(limit) if path else () for path, limit in limits]
        super().__init__(rows[0], rows[1], rows[2], eval_batch_size=eval_batch_size, shuffle=shuffle, seed=seed)

    def rows_to_score(self, stage: str) -> Iterator[Info]:
        """The parent's rows, each with its file and line as `where`."""
        for rows in (self.train_prompts if stage == "fit" else (), self.held_out):
            if isinstance(rows, Lines):
                yield from ({**row, "where": f"{rows.path}:{rows.line(i)}"} for i, row in enumerate(rows))


def read_prompts(path: Path, *, prompt_key: str = "prompt") -> list[Info]:
    """The prompts of a .txt or .jsonl file, in order; raises ValueError with file and line for the first row that is not one."""
    return list(_prompts(path, prompt_key=prompt_key))


def _prompts(path: Path, *, prompt_key: str) -> Lines[Info]:
    """The same, left on the disk."""
    path = path.expanduser()
    if not path.exists():
        raise ConfigError(f"{path}: no such file or folder")
    if path.suffix not in SUFFIXES or path.is_dir():
        raise ConfigError(f"{path}: prompts are read from {' or '.join(SUFFIXES)} files")
    rows = Lines(path, partial(_row, prompt_key=prompt_key) if path.suffix == ".jsonl" else _text)
    if not rows:
        raise ConfigError(f"{path}: holds no prompts")
    if recall(name := named(["prompts", rows.digest, path.suffix, prompt_key])) is None:
        with alone(name, rows=len(rows)):
            if recall(name) is None:  # another process of the run may have looked meanwhile
                _look(rows)
                keep(name, Verdict(), rows=len(rows))
    return rows


def _look(rows: Lines[Info]) -> None:
    """Raise ConfigError with file and line for the first row that is no prompt."""
    seen = 0
    try:
        for _ in rows:
            seen += 1
    except InvalidRow as error:
        raise ConfigError(f"{rows.path}:{rows.line(seen)}: {error}") from error


def _text(line: str) -> Info:
    return MappingProxyType({"prompt": line.strip()})


def _row(line: str, *, prompt_key: str) -> Info:
    row = json_row(line)
    if isinstance(row, NotJSON):
        raise InvalidRow(row.reason)
    if not isinstance(row, dict):
        raise InvalidRow(f'expected an object such as {{"{prompt_key}": ...}}, found {type(row).__name__}')
    if not isinstance(row.get(prompt_key), str) or not row[prompt_key].strip():
        raise InvalidRow(f"key {prompt_key!r} must be a non-empty string; found {sorted(row)}; see data.prompt_key")
    return MappingProxyType(row | {"prompt": row[prompt_key]})


def _split_file(folder: Path, *names: str) -> Path:
    for name in names:
        for suffix in SUFFIXES:
            if (folder / f"{name}{suffix}").is_file():
                return folder / f"{name}{suffix}"
    found = sorted(p.name for p in folder.iterdir())
    raise ConfigError(f"{folder}: needs {' or '.join(f'{n}{s}' for n in names for s in SUFFIXES)}; found {found}")
