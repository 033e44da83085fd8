"""The content of checkpoints of any kind beside their shards."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from lit_rl.checkpoints.contents import Checkpoint
from lit_rl.checkpoints.position import state_file
from lit_rl.checkpoints.restricted import deepspeed_reads_plain_files, load_file


def content(checkpoint: Path) -> Checkpoint:
    """The content of a checkpoint but for a folder's shards; tensors stay on the disk until they are used. Else it is empty."""
    file = state_file(checkpoint)
    with deepspeed_reads_plain_files() if file.parent.name == "checkpoint" else nullcontext():
        found = load_file(file, mmap=True)
        return found if isinstance(found, dict) else {}
