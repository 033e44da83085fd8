"""The number that says how a checkpoint is laid out, so that one of another release gets a sentence."""

from __future__ import annotations

from pathlib import Path

from lit_rl.checkpoints.position import number_in
from lit_rl.errors import ConfigError

CHECKPOINT_VERSION = 1
"""Version of what a method stores. It rises whenever older checkpoints cannot be continued exactly; those without a number have 0."""

KEY = "lit_rl_version"
"""Key of that number: in a single file, in `meta.pt` of FSDP2's folders, in the model states of DeepSpeed's."""


def check_file(checkpoint: Path, processes: int | None = None) -> None:
    """Raise ConfigError for a file or folder of another version. One that cannot be read is told of when it is loaded.

    processes: of the run that would train on from it; of DeepSpeed's folders each reads the file of its own rank.
    """
    written = len(list((checkpoint / "checkpoint").glob("*_optim_states.pt")))
    if processes and written not in (0, processes):
        raise ConfigError(
            f"checkpoint {checkpoint} is a folder of DeepSpeed's that {written} processes wrote, and this run has {processes}: continue "
            f"with {written} under the same configs/base/deepspeed_*.yaml; checkpoints of configs/base/fsdp.yaml continue on any number"
        )
    stored = number_in(checkpoint, KEY)
    if stored is not None:
        check_version(max(0, stored), f"checkpoint {checkpoint}")


def check_version(stored: int, which: str = "the checkpoint") -> None:
    """Raise ConfigError for a checkpoint of another version than this release reads."""
    if stored > CHECKPOINT_VERSION:
        raise ConfigError(f"{which} is of version {stored}, and this release reads {CHECKPOINT_VERSION}: update lit-rl")
    if stored < CHECKPOINT_VERSION:
        raise ConfigError(
            f"{which} is of version {stored}, of an earlier release, and this one reads {CHECKPOINT_VERSION}: continue with the release "
            "that wrote it, or start a new run from the weights that Export wrote (model.init_args.policy.init_args.pretrained or "
            "lora.initial)"
        )
