"""Random streams continue where the checkpoint was written."""

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from toy import ToyData, toy_method, toy_trainer

from callbacks.rng_state import RngState, restore_streams, streams


def draws() -> list[Any]:
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(()).item(), torch.randn(3).tolist()]


def test_streams_continue_after_a_way_through_a_file(tmp_path: Path) -> None:
    """An odd number of normals leaves half a Box-Muller pair behind in Python's and NumPy's generators: it belongs to the state."""
    random.gauss(0, 1), np.random.randn()
    torch.save(streams(), tmp_path / "state.pt")
    expected = draws()
    draws()
    restore_streams(torch.load(tmp_path / "state.pt", weights_only=True))
    assert draws() == expected


class Draws(L.Callback):
    """Keeps the numbers that dropout would draw at each batch of epoch 1."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == 1:
            self.seen.append(draws())


def test_a_continued_run_draws_the_same(tmp_path: Path) -> None:
    """Validation before training, and whatever else draws while things are set up, makes no difference."""
    unbroken, continued = Draws(), Draws()
    keep = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=True)
    toy_trainer(tmp_path, callbacks=[RngState(), unbroken, keep], enable_checkpointing=True).fit(toy_method(dropout=0.1), ToyData())
    L.seed_everything(77, verbose=False)
    again = toy_trainer(tmp_path, callbacks=[RngState(), continued], num_sanity_val_steps=2, limit_val_batches=1.0)
    again.fit(toy_method(dropout=0.1), ToyData(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert continued.seen == unbroken.seen and unbroken.seen


def test_each_rank_gets_its_own_stream() -> None:
    states = []
    for seed in (1, 2):
        L.seed_everything(seed, verbose=False)
        states.append(streams())
    expected = draws()
    callback = RngState()
    callback.on_load_checkpoint(None, None, {"rng": states})  # type: ignore[arg-type]
    callback.on_train_start(SimpleNamespace(world_size=2, global_rank=1), None)  # type: ignore[arg-type]
    assert draws() == expected


def test_another_number_of_processes_is_said() -> None:
    callback = RngState()
    callback.on_load_checkpoint(None, None, {"rng": [streams(), streams()]})  # type: ignore[arg-type]
    before = torch.get_rng_state()
    with pytest.warns(UserWarning, match="2 processes, this run has 1"):
        callback.on_train_start(SimpleNamespace(world_size=1, global_rank=0), None)  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), before)
