"""One sentence for the disk, the folder or the process that ended a run, and the checkpoint to go on from."""

from __future__ import annotations

import errno
import os
import traceback
from pathlib import Path

from lit_rl.ranks import lost_contact

_ELSEWHERE = "set run.dir, or where the run names it the folder of what writes there, to one that can be written"
_ADVICE = {
    errno.ENOSPC: "free space there, keep fewer checkpoints (save_top_k), or move the run's folders to another disk",
    errno.EDQUOT: "free space there, keep fewer checkpoints (save_top_k), or move the run's folders to another disk",
    errno.EFBIG: "the file system or a limit (ulimit -f) allows no file of that size",
    errno.EROFS: _ELSEWHERE,
    errno.EACCES: _ELSEWHERE,
    errno.EPERM: _ELSEWHERE,
    errno.ENOTDIR: _ELSEWHERE,
    errno.EISDIR: _ELSEWHERE,
    errno.ENOENT: "a folder of the run was moved or removed while it ran, or a file that it reads",
    errno.EIO: "the disk or the network file system fails",
    errno.ESTALE: "the disk or the network file system fails",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}


def what_ended(error: BaseException) -> str | None:
    """One sentence, or None for what is a mistake in the program and needs its traceback."""
    from torch.distributed.checkpoint.api import CheckpointException

    if isinstance(error, CheckpointException):
        causes = [cause for _, (cause, _) in sorted(error.failures.items())]
        return next((text for cause in causes if (text := what_ended(cause))), f"a checkpoint was not written: {_first_line(causes[0])}")
    if isinstance(error, OSError) and error.errno in _ADVICE and not isinstance(error, ConnectionError):
        names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes | os.PathLike)]
        return f"{' -> '.join(names) or 'a file'}: {error.strerror}; {_ADVICE[error.errno]}"
    if lost_contact(error):
        notes = getattr(error, "__notes__", [])
        if notes:  # by callbacks.heartbeat
            return f"{notes[0]} has ended or does not answer: {_first_line(error)}"
        return (
            "another process of this run has ended, or has not answered for as long as trainer.strategy.init_args.timeout says (30 minutes "
            f"if it is not set): {_first_line(error)}"
        )
    if isinstance(error, RuntimeError) and str(error).startswith("Early stopping conditioned on metric"):
        return f"EarlyStopping in trainer.callbacks: {_first_line(error).removeprefix('RuntimeError: ')}"
    if _while_restoring(error):
        return f"the checkpoint of --ckpt_path does not hold what this run restores from it: {_first_line(error)}"
    return None


def _while_restoring(error: BaseException) -> bool:
    """Lightning takes a checkpoint apart without looking: what is not there, or of another type, fails anywhere in it."""
    frames = traceback.extract_tb(error.__traceback__)
    names = {frame.name.lstrip("_") for frame in frames if Path(frame.filename).name == "checkpoint_connector.py"}
    return isinstance(error, Exception) and any(name.startswith(("restore", "resume_start")) for name in names)


def _first_line(error: BaseException) -> str:
    lines = str(error).partition(" This is typically caused")[0].strip().splitlines()  # gloo guesses
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
