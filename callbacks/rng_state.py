"""The global random streams (dropout, and whatever a library draws) of every process, in the checkpoint."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypedDict

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from callbacks.base import RLCallback
from lit_rl.checkpoints.contents import Checkpoint
from lit_rl.ranks import gather_objects


class NumpyStream(TypedDict):
    """NumPy's Mersenne Twister in plain numbers."""

    key: list[int]
    pos: int
    has_gauss: int
    gauss: float


class Streams(TypedDict):
    """The generators of a process, in types that `torch.load(weights_only=True)` accepts."""

    python: tuple[int, Sequence[int], float | None]
    numpy: NumpyStream
    torch: Tensor
    cuda: Tensor | None


class RngState(RLCallback):
    """Python's, NumPy's, torch's and CUDA's generator of each process: saved with every checkpoint, restored when training starts.

    Rollouts, prompts, minibatches and evaluation do not need it: their draws are functions of (seed, purpose, iteration, ...). What is
    left is dropout. Restored in `on_train_start` because loaders are built and sanity checks run after a checkpoint is read. A checkpoint
    in the middle of an optimizer step, whose minibatches come again, has the streams of its beginning.
    """

    def __init__(self) -> None:
        self._restored: list[Streams] | None = None
        self._begun: tuple[int, Streams] | None = None  # an optimizer step, and the streams when the next one began

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: object, batch_idx: int) -> None:
        """Keep the streams at the beginning of an optimizer step."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._begun = trainer.global_step, streams()

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: Checkpoint) -> None:
        """Store the streams of all processes."""
        begun = self._begun
        checkpoint["rng"] = gather_objects(begun[1] if begun and begun[0] == trainer.global_step else streams())

    def on_load_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: Checkpoint) -> None:
        """Keep the stored streams until training starts."""
        self._restored = checkpoint.get("rng")

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Restore this process's streams."""
        saved, self._restored = self._restored, None
        if saved is None:
            return
        if len(saved) != trainer.world_size:
            rank_zero_warn(
                f"The checkpoint holds the random streams of {len(saved)} processes, this run has {trainer.world_size}: "
                "dropout continues with new draws (rollouts, prompts and minibatches do not depend on it)"
            )
            return
        restore_streams(saved[trainer.global_rank])


def streams() -> Streams:
    """State of the four generators of this process, in types that `torch.load(weights_only=True)` accepts."""
    state = np.random.get_state(legacy=False)
    return {
        "python": random.getstate(),
        "numpy": {
            "key": state["state"]["key"].tolist(),
            "pos": int(state["state"]["pos"]),
            "has_gauss": int(state["has_gauss"]),
            "gauss": float(state["gauss"]),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore_streams(state: Streams) -> None:
    """Continue where `streams` was called."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    numpy = state["numpy"]
    np.random.set_state(("MT19937", np.array(numpy["key"], dtype=np.uint32), numpy["pos"], numpy["has_gauss"], numpy["gauss"]))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
