"""Numbers in a checkpoint, told from its content without loading it: how far the run was, for file times do not survive a copy."""

from __future__ import annotations

import pickletools
import zipfile
from pathlib import Path
from typing import IO

from lit_rl.checkpoints.manifest import ZIP_ERRORS

MEMO = ("BINPUT", "LONG_BINPUT", "MEMOIZE", "PUT")


def step_of(checkpoint: Path) -> int:
    """Its `global_step`, or -1 if it has none or cannot be read."""
    step = number_in(checkpoint, "global_step")
    return -1 if step is None else step


def number_in(checkpoint: Path, key: str) -> int | None:
    """The integer beside the weights that is called `key`, -1 if there is none, None if the file cannot be read. Nothing is executed."""
    try:
        with zipfile.ZipFile(state_file(checkpoint)) as archive:
            name = next((name for name in archive.namelist() if name.endswith("data.pkl")), None)
            if name is None:
                return None
            with archive.open(name) as stream:
                return _number_after(key, stream)
    except (*ZIP_ERRORS, OSError, ValueError):
        return None


def state_file(checkpoint: Path) -> Path:
    """The file that holds what is beside the weights: of FSDP2's folders `meta.pt`, of DeepSpeed's the first process's model states."""
    if (checkpoint / "checkpoint").is_dir():
        return min((checkpoint / "checkpoint").glob("*model_states.pt"), default=checkpoint)
    return checkpoint / "meta.pt" if checkpoint.is_dir() else checkpoint


def _number_after(key: str, stream: IO[bytes]) -> int:
    """The integer that follows the string `key` in a pickle, which names a string that comes again by its number in the memo."""
    follows, place = False, None
    for opcode, argument, _ in pickletools.genops(stream):
        if follows and opcode.name in MEMO:
            place = argument
            continue
        if follows and isinstance(argument, int) and "INT" in opcode.name:
            return argument
        follows = argument == key or (opcode.name in ("BINGET", "LONG_BINGET") and argument == place)
    return -1
