"""Copies of trained weights, what tests of averages and old policies do with them, and a policy of other weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from toy import ToyPolicy


def weights(module: Any) -> dict[str, Tensor]:
    """A copy of each trained weight by its name."""
    return {name: p.detach().clone() for name, p in module.policy.trainable()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """The same names and bits."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def keep_all(folder: Path) -> ModelCheckpoint:
    """`folder`/epoch=0.ckpt and so on."""
    return ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=True)


def every_step(folder: Path) -> ModelCheckpoint:
    """`folder`/epoch=0-step=1.ckpt and so on."""
    return ModelCheckpoint(dirpath=folder, filename="{epoch}-{step}", save_top_k=-1, every_n_train_steps=1)


class OneFrozen(ToyPolicy):
    """Trains all weights but the first, so that copies of another policy's are of other weights."""

    def load(self) -> None:
        super().load()
        next(self.parameters()).requires_grad = False
