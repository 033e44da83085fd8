"""Checkpoint files on disk: written whole or not at all, and looked at before anything is loaded from them."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only

from lit_rl.checkpoints.contents import Checkpoint, check_contents
from lit_rl.checkpoints.manifest import ZIP_ERRORS, SealedFile, damage, folder_damage, has_checksums, missing_files
from lit_rl.checkpoints.position import step_of
from lit_rl.checkpoints.replacing import atomic_file, left_targets, naming, recovered, swept
from lit_rl.checkpoints.restricted import named_errors
from lit_rl.errors import ConfigError

if TYPE_CHECKING:
    import lightning as L


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a hidden file beside the target, fsyncs, renames: a process killed at any moment leaves the old file or the new one.

    Lightning's own writer holds the whole file in memory and then moves it from the system's temporary folder, which is a copy
    (and can be cut short) when that is another disk.
    """

    @classmethod
    def install(cls, trainer: L.Trainer) -> None:
        """Use it wherever the strategy would use Lightning's plain writer. DeepSpeed and FSDP2's sharded folders use neither."""
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = cls()

    def save_checkpoint(self, checkpoint: Checkpoint, path: str | Path, storage_options: object = None) -> None:
        """Write a checkpoint whole, with checksums. An address (http://) is left to Lightning."""
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        with naming(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        swept(target, is_whole)
        with naming(target), atomic_file(target) as file:
            sealed = SealedFile(file)
            try:
                torch.save(checkpoint, cast(IO[bytes], sealed))  # writes are all that it asks for
            except RuntimeError as error:
                raise sealed.error or error from error
            sealed.seal()

    def load_checkpoint(
        self, path: str | Path, map_location: Callable[..., object] | None = lambda storage, loc: storage, weights_only: bool | None = None
    ) -> Checkpoint:
        """weights_only: False executes what the file names; None is True, for addresses (http://) too, where Lightning's own is False."""
        if os.path.isdir(path):
            raise ConfigError(f"--ckpt_path {path} is a folder of shards: continue with the configs/base/*.yaml it was written under")
        if "://" not in str(path):
            refuse_damaged(Path(path), what_is_wrong(Path(path)))
            note_age(Path(path))
        with named_errors(path):
            found = super().load_checkpoint(path, map_location, weights_only is not False)
        return check_contents(found, path)


def resolve_checkpoint(path: str, folders: Sequence[str | os.PathLike]) -> str | None:
    """The complete checkpoint that `--ckpt_path` names, or None to start from scratch.

    "last" is the `last*.ckpt` of `folders` (the `dirpath`s of the checkpoint callbacks) after most optimizer steps, where there is none the
    complete checkpoint after most, None with a notice if there is nothing yet. Raises ConfigError if nothing is at `path`, or if it is
    incomplete (a run was killed while writing, a disk was full), naming the newest undamaged checkpoint beside it. `.ckpt` may be left out.
    """
    recover_all([*folders, Path(path).parent])
    if path == "last":
        return _resolve_last([Path(folder) for folder in folders])
    found = Path(path)
    if (state := Path(f"{path.rstrip('/')}.ckpt")).exists() and not (found.exists() and _sharded(found)):
        path, found = str(state), state  # the checkpoint of that name, beside which an export of its weights may stand
    if not found.exists():
        raise ConfigError(f"--ckpt_path {path}: no such file or folder; {_advice(found)}")
    if found.is_dir() and not _sharded(found) and _complete_in(found):
        raise ConfigError(f"--ckpt_path {path} is a folder of checkpoints; {_advice(found / '*')}")
    _refuse_incomplete(found)
    return path


def check_unused(folders: Sequence[str | os.PathLike]) -> None:
    """Raises ConfigError where a new run would write among the checkpoints of another, after which `last` could be either's."""
    recover_all(folders)
    for folder in map(Path, folders):
        if there := newest_complete(folder):
            raise ConfigError(
                f"{folder} holds checkpoints of an earlier run (newest: {there.name}): continue it with --ckpt_path last, give this "
                "run another --run.name, or move that folder away"
            )


def recover_all(folders: Iterable[str | os.PathLike]) -> None:
    """End what a killed process has broken off: a whole checkpoint that has not come to its place, or has left it for another."""
    for target in sorted({target for folder in folders for target in left_targets(Path(folder))}):
        if recovered(target, is_whole):
            rank_zero_info(f"a run was killed while {target} changed places; what was whole stands there again")


def is_whole(checkpoint: Path) -> bool:
    """True when nothing of a checkpoint is missing; contents are not read."""
    return what_is_missing(checkpoint) is None


def what_is_missing(checkpoint: Path) -> str | None:
    """Why `checkpoint` cannot be whole, or None; contents are not read.

    Files are zip archives (directory last); folders FSDP2's or DeepSpeed's, with sizes in their manifest.
    """
    if checkpoint.is_file():
        return _broken_file(checkpoint)
    if not checkpoint.exists():
        return "does not exist"
    if problem := missing_files(checkpoint):
        return problem
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


def what_is_wrong(checkpoint: Path, rank: int = 0, size: int = 1) -> str | None:
    """The reason why `checkpoint` is damaged, or None. Reads all of a file, and process `rank`'s share of a folder's files."""
    if missing := what_is_missing(checkpoint):
        return missing
    return damage(checkpoint) if checkpoint.is_file() else folder_damage(checkpoint, rank, size)


def note_age(checkpoint: Path) -> None:
    """Say once that a checkpoint has no checksums."""
    if not has_checksums(checkpoint):
        rank_zero_info(
            f"{checkpoint} is of an earlier release, without checksums: the CRC32 of its archives, which covers less, was compared"
        )


def newest_complete(folder: Path, *, intact: bool = False) -> Path | None:
    """The newest checkpoint of a folder that is whole. intact: and whose content, which is read for it, is what was written."""
    found = newest_first(_complete_in(folder))
    return next((path for path in found if not intact or not (path.is_file() or has_checksums(path)) or what_is_wrong(path) is None), None)


def newest_first(checkpoints: Iterable[Path]) -> list[Path]:
    """Checkpoints by their optimizer steps, the latest first."""
    return sorted(checkpoints, key=_age_key, reverse=True)


def _resolve_last(folders: list[Path]) -> str | None:
    if not folders:
        raise ConfigError(
            "--ckpt_path last looks into the dirpath of ModelCheckpoint, and this run has none: leave run.callbacks.newest as it is"
        )
    found = [file for folder in folders for file in folder.glob("last*.ckpt") if file.exists()]  # a link may point to what was removed
    if not found:
        return _without_last(folders)
    youngest = max(found, key=lambda path: path.stat().st_mtime_ns)
    newest = youngest if what_is_missing(youngest) else max(found, key=_age_key)
    _refuse_incomplete(newest)
    return str(newest)


def _without_last(folders: list[Path]) -> str | None:
    """ModelCheckpoint's `save_last: link` removes the link before it makes the new one: a run can be killed in between."""
    where = ", ".join(str(folder) for folder in folders)
    found = newest_first(path for folder in folders for path in _complete_in(folder))
    if not found:
        rank_zero_info(f"no checkpoint in {where} yet, starting from scratch")
        return None
    rank_zero_info(f"no last.ckpt in {where}: continuing from the checkpoint after most optimizer steps, {found[0]}")
    _refuse_incomplete(found[0])
    return str(found[0])


def _refuse_incomplete(checkpoint: Path) -> None:
    """Contents of files are read here by the first process, before anything is loaded; of folders by all, each a share, when they load."""
    reads = checkpoint.is_file() and getattr(rank_zero_only, "rank", 0) == 0
    refuse_damaged(checkpoint, what_is_wrong(checkpoint) if reads else what_is_missing(checkpoint))


def refuse_damaged(checkpoint: Path, problem: str | None) -> None:
    """Raises ConfigError with `problem`, if there is one, that names the newest good checkpoint beside it."""
    if problem is not None:
        raise ConfigError(f"checkpoint {checkpoint} {problem}; {_advice(checkpoint)}")


def _advice(checkpoint: Path) -> str:
    folder = checkpoint.parent
    good = newest_complete(folder, intact=True) if folder.is_dir() else None
    return f"no complete checkpoint is in {folder}" if good is None else f"the newest complete one there: use --ckpt_path {good}"


def _complete_in(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*.ckpt") if what_is_missing(path) is None]


def _sharded(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("checkpoint", ".metadata", "meta.pt"))


def _broken_file(file: Path) -> str | None:
    try:
        with zipfile.ZipFile(file) as archive:
            return None if archive.namelist() else f"is incomplete ({file.name} holds nothing)"
    except ZIP_ERRORS:
        size = file.stat().st_size
        return f"is incomplete or not a checkpoint ({file.name}, {size} bytes, has no end: was the run killed, or the disk full?)"


def _first(problems: Iterable[str | None]) -> str | None:
    return next((problem for problem in problems if problem is not None), None)


def _age_key(path: Path) -> tuple[int, int, str]:
    """By content; a file's time is that of its copy, and decides between equals only."""
    return step_of(path), path.stat().st_mtime_ns, path.name
