"""Checkpoint folders that every process writes a share of: whole or not at all, and looked at before they are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor

from lit_rl.checkpoints.contents import with_nan
from lit_rl.checkpoints.files import is_whole, note_age, refuse_damaged, what_is_wrong
from lit_rl.checkpoints.layout import checkpointed
from lit_rl.checkpoints.manifest import entries, write_manifest
from lit_rl.checkpoints.optimizer import check_moments as check_same_moments
from lit_rl.checkpoints.replacing import beside, naming, put_in_place, remove, swept
from lit_rl.errors import ConfigError, listed
from lit_rl.policies.weights.shards import part
from lit_rl.ranks import gather_objects


@contextmanager
def replaced(strategy: ParallelStrategy, target: str | Path) -> Iterator[Path]:
    """A folder to write a checkpoint into, which takes the place of `target` when every process has left the block without an exception.

    Each process then reads back the checksums of what it wrote; with all of them in its manifest the folder is whole.
    """
    final = Path(strategy.broadcast(target))
    new = strategy.broadcast(beside(final))
    if strategy.is_global_zero:
        swept(final, is_whole)
    strategy.barrier()
    try:
        with naming(final):
            yield new
    except BaseException:
        if strategy.is_global_zero:
            remove(new)  # the disk may be full
        raise
    strategy.barrier()
    found = gather_objects(entries(new, strategy.global_rank, strategy.world_size))
    if strategy.is_global_zero:
        with naming(final):
            write_manifest(new, found)
            put_in_place(new, final)
    strategy.barrier()


def check_intact(strategy: ParallelStrategy, folder: Path) -> None:
    """Raises ConfigError on every process if a process finds its share of a checkpoint folder damaged. Collective."""
    try:
        problem = what_is_wrong(folder, strategy.global_rank, strategy.world_size)
    except (ConfigError, OSError) as error:
        problem = f"cannot be read ({error})"
    refuse_damaged(folder, next((found for found in gather_objects(problem) if found), None))
    note_age(folder)


def refuse_nan(strategy: ParallelStrategy, folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Raises ConfigError on every process if one holds a NaN in its part of the weights. Collective."""
    mine = with_nan((name, part(weight)) for name, weight in weights.items())
    if bad := sorted({name for found in gather_objects(mine) for name in found}):
        raise ConfigError(f"checkpoint {folder} holds NaN in {listed(bad)}: training had failed when it was written, use an earlier one")


def check_moments(strategy: ParallelStrategy, stored: Mapping[str, object]) -> None:
    """Raise ConfigError before moments of another optimizer are restored. A run without training restores none."""
    if strategy.optimizers:
        check_same_moments(stored, checkpointed(strategy.lightning_module).configured_optimizer)
