"""Checkpoint files on disk: written whole or not at all, and looked at before anything is loaded from them."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lit_rl.checkpoints.restricted import told
from lit_rl.errors import ConfigError

if TYPE_CHECKING:
    import lightning as L


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes `.<name>.tmp` beside the target, fsyncs, renames: a process killed at any moment leaves the old file or the new one.

    Lightning's own writer holds the whole file in memory and then moves it from the system's temporary folder, which is a copy
    (and can be cut short) when that is another disk.
    """

    @classmethod
    def install(cls, trainer: L.Trainer) -> None:
        """Use it wherever the strategy would use Lightning's plain writer. DeepSpeed and FSDP2's sharded folders use neither."""
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = cls()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(target) as file:
            torch.save(checkpoint, file)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = lambda storage, loc: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """weights_only: False executes what the file names; None is True, for addresses (http://) too, where Lightning's own is False."""
        if os.path.isdir(path):
            raise ConfigError(f"--ckpt_path {path} is a folder of shards: continue with the configs/base/*.yaml it was written under")
        with told(path):
            return super().load_checkpoint(path, map_location, weights_only is not False)


@contextmanager
def atomic_file(target: Path) -> Iterator[IO[bytes]]:
    """A binary file for writing that appears under its name only when the block ends without an exception."""
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """fsync a folder, so that a rename in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def resolve_checkpoint(path: str, folders: Sequence[str | os.PathLike]) -> str | None:
    """What `--ckpt_path` means: a complete checkpoint's path, or None to start from scratch.

    "last" is the newest `last*.ckpt` of `folders` (the `dirpath`s of the checkpoint callbacks), None with a notice if there is none yet;
    "best", "hpc", "registry..." and URLs are passed on. Raises ConfigError if nothing is there or if it is incomplete (a run was
    killed while writing, a disk was full), naming the newest complete checkpoint beside it. Reads directories of files, never contents.
    """
    if path in ("best", "hpc") or path.startswith("registry") or "://" in path:
        return path
    if path == "last":
        return _resolve_last([Path(folder) for folder in folders])
    found = Path(path)
    if not found.exists():
        raise ConfigError(f"--ckpt_path {path}: no such file or folder; {_advice(found)}")
    if found.is_dir() and not _sharded(found) and _complete_in(found):
        raise ConfigError(f"--ckpt_path {path} is a folder of checkpoints; {_advice(found / '*')}")
    _refuse_incomplete(found)
    return path


def check_unused(folders: Sequence[str | os.PathLike]) -> None:
    """Raises ConfigError where a new run would write among the checkpoints of another, after which `last` could be either's."""
    for folder in map(Path, folders):
        if there := newest_complete(folder):
            raise ConfigError(
                f"{folder} holds checkpoints of an earlier run (newest: {there.name}): continue it with --ckpt_path last, or set dirpath "
                "of ModelCheckpoint in trainer.callbacks to another folder, or move that one away"
            )


def what_is_missing(checkpoint: Path) -> str | None:
    """Why `checkpoint` cannot be whole, or None. Files are zip archives (directory last); folders FSDP2's or DeepSpeed's."""
    if checkpoint.is_file():
        return _broken_file(checkpoint)
    if not checkpoint.exists():
        return "does not exist"
    if (checkpoint / "checkpoint").is_dir():
        states = sorted((checkpoint / "checkpoint").glob("*.pt"))
        if not any("model_states" in file.name for file in states):
            return "is a DeepSpeed checkpoint without model states"
        if not (checkpoint / "latest").exists():
            return "is a DeepSpeed checkpoint without `latest`, which is written last"
        return _first(_broken_file(file) for file in states)
    if not (checkpoint / ".metadata").is_file():
        return "is a folder without `.metadata` (FSDP2) or `checkpoint/` (DeepSpeed)"
    if not (checkpoint / "meta.pt").is_file():
        return "is an FSDP2 checkpoint without `meta.pt`"
    return _broken_file(checkpoint / "meta.pt")


def newest_complete(folder: Path) -> Path | None:
    """The newest checkpoint of a folder that is whole."""
    return max(_complete_in(folder), key=_age_key, default=None)


def _resolve_last(folders: list[Path]) -> str | None:
    if not folders:
        raise ConfigError(
            "--ckpt_path last looks into the dirpath of ModelCheckpoint, and none is set: add dirpath to it in trainer.callbacks"
        )
    found = [file for folder in folders for file in folder.glob("last*.ckpt")]
    if not found:
        rank_zero_info(f"no checkpoint in {', '.join(str(f) for f in folders)} yet, starting from scratch")
        return None
    newest = max(found, key=_age_key)
    _refuse_incomplete(newest)
    return str(newest)


def _refuse_incomplete(checkpoint: Path) -> None:
    missing = what_is_missing(checkpoint)
    if missing is not None:
        raise ConfigError(f"checkpoint {checkpoint} {missing}; {_advice(checkpoint)}")


def _advice(checkpoint: Path) -> str:
    folder = checkpoint.parent
    good = newest_complete(folder) if folder.is_dir() else None
    return f"no complete checkpoint is in {folder}" if good is None else f"the newest complete one there: use --ckpt_path {good}"


def _complete_in(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*.ckpt") if what_is_missing(path) is None]


def _sharded(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("checkpoint", ".metadata", "meta.pt"))


def _broken_file(file: Path) -> str | None:
    try:
        with zipfile.ZipFile(file) as archive:
            return None if archive.namelist() else f"is incomplete ({file.name} holds nothing)"
    except zipfile.BadZipFile:
        size = file.stat().st_size
        return f"is incomplete or not a checkpoint ({file.name}, {size} bytes, has no end: was the run killed, or the disk full?)"


def _first(problems: Iterable[str | None]) -> str | None:
    return next((problem for problem in problems if problem is not None), None)


def _age_key(path: Path) -> tuple[int, str]:
    return path.stat().st_mtime_ns, path.name
