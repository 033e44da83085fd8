"""Resolves `--ckpt_path` where it is a word (last, best, hpc) or an address."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from fsspec.core import url_to_fs
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lit_rl.checkpoints.files import is_whole, newest_complete, newest_first, resolve_checkpoint
from lit_rl.checkpoints.reading import content
from lit_rl.errors import ConfigError


def choose_checkpoint(path: str, keepers: Sequence[ModelCheckpoint], root: str) -> str | None:
    """A checkpoint's path, or None to start from scratch. keepers: of the run's checkpoints. root: `trainer.default_root_dir`.

    "best" is the one that a ModelCheckpoint with a `monitor` calls so in the states that the run's checkpoints hold; "hpc" the newest
    `hpc_ckpt_*.ckpt` that Lightning writes under SLURM; the rest as in `resolve_checkpoint`. Raises ConfigError if it is not there.
    """
    if path == "best":
        return _best(keepers)
    if path == "hpc":
        return _hpc(Path(root))
    if path.startswith("registry"):
        if find_spec("litmodels") is None:
            raise ConfigError(f"--ckpt_path {path} needs the package litmodels, which is not installed: download the file, give its path")
        return path
    if "://" in path:
        return _address(path)
    return resolve_checkpoint(path, [keeper.dirpath for keeper in keepers if keeper.dirpath])


def is_count(monitor: object) -> bool:
    """True for what makes a ModelCheckpoint keep the newest ones: no monitor, or a number that only rises."""
    return monitor in (None, "step", "epoch", "iteration")


def _best(keepers: Sequence[ModelCheckpoint]) -> str:
    keeper = next((k for k in keepers if not is_count(k.monitor) and k.dirpath), None)
    if keeper is None:
        raise ConfigError(
            "--ckpt_path best is what a ModelCheckpoint with monitor has kept, and trainer.callbacks has none: add one, or "
            "give the path of a checkpoint"
        )
    folder = Path(str(keeper.dirpath))
    found = [(score, path) for score, named in _kept(keepers, str(keeper.monitor)) if (path := _now_at(named, folder))]
    if not found:
        raise ConfigError(f"--ckpt_path best: no checkpoint in {folder} is known to be the best by {keeper.monitor}: run fit first")
    score, path = (max if keeper.mode == "max" else min)(found, key=lambda one: one[0])
    rank_zero_info(f"--ckpt_path best: {path}, {keeper.monitor}={score:.4g}")
    return str(path)


def _kept(keepers: Sequence[ModelCheckpoint], monitor: str) -> Iterator[tuple[float, Path]]:
    """Score and file of what a ModelCheckpoint of `monitor` calls the best, as each checkpoint of the run has it."""
    folders = dict.fromkeys(Path(keeper.dirpath) for keeper in keepers if keeper.dirpath)
    for checkpoint in [path for folder in folders for path in sorted(folder.glob("*.ckpt")) if is_whole(path)]:
        states = content(checkpoint).get("callbacks", {})
        for state in states.values():
            if isinstance(state, dict) and state.get("monitor") == monitor and state.get("best_model_score") is not None:
                yield float(state["best_model_score"]), Path(state["best_model_path"])


def _now_at(named: Path, folder: Path) -> Path | None:
    """A file where its name was written down, or in the folder that it has moved to with the others."""
    return next((path for path in (folder / named.name, named) if is_whole(path)), None)


def _hpc(root: Path) -> str:
    """Lightning's own choice would be a folder's name if there is none."""
    numbered = [(int(match[1]), file) for file in root.glob("hpc_ckpt_*.ckpt") if (match := re.fullmatch(r"hpc_ckpt_(\d+)", file.stem))]
    if not numbered:
        raise ConfigError(f"--ckpt_path hpc: no hpc_ckpt_*.ckpt, as Lightning writes them under SLURM, is in {root}: use --ckpt_path last")
    return str(resolve_checkpoint(str(max(numbered)[1]), []))


def _address(path: str) -> str:
    if urlsplit(path).scheme == "file":
        return str(resolve_checkpoint(url2pathname(urlsplit(path).path), []))
    problem = "there is no such file, or nobody answers"
    try:
        system, inner = url_to_fs(path)
        if system.exists(inner):
            return path
    except (ImportError, ValueError, OSError) as error:
        problem = str(error)
    raise ConfigError(f"--ckpt_path {path} cannot be read: {problem}; download the checkpoint and give its path")


def go_on(folders: Sequence[str | os.PathLike]) -> str:
    """Returns the sentence that says from which checkpoint a run that has ended continues."""
    found = newest_first([path for folder in folders if (path := newest_complete(Path(folder)))])
    if found:
        return f"the last complete checkpoint is {found[0]}: continue with --ckpt_path {found[0]}"
    return "there is no complete checkpoint to continue from yet"
