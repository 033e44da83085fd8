"""Weights that other programs load, written while training goes on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal

import lightning as L
from torch import Tensor

from callbacks.ema import EMA
from callbacks.graceful_stop import GracefulStop
from lit_rl.errors import ConfigError
from lit_rl.policies.shards import gathered


class Export(L.Callback):
    """`<dirpath>/iteration-<n>` after n rollouts, as the policy's `save` writes it: what stock diffusers takes.

    A folder appears whole or not at all. Weights are gathered one tensor at a time on all processes; the first one keeps and writes them.

    Args:
        dirpath: Folder of the exported folders.
        every_n_epochs: Iterations between two exports (the warm-up counts as one); the end of training is always exported.
        weights: What training holds ("live") or the average of `callbacks.ema.EMA` ("ema").
        keep: Exports that are kept, the newest ones; None = all.
    """

    def __init__(self, dirpath: str, *, every_n_epochs: int = 1, weights: Literal["live", "ema"] = "live", keep: int | None = 3) -> None:
        if every_n_epochs < 1 or (keep is not None and keep < 1):
            raise ConfigError(f"Export every_n_epochs={every_n_epochs} and keep={keep} must be at least 1 (keep: or null for all)")
        self.dirpath = Path(dirpath)
        self.every_n_epochs = every_n_epochs
        self.weights = weights
        self.keep = keep
        self._exported = -1

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        if self.weights == "ema" and self._ema(trainer) is None:
            raise ConfigError("Export weights=ema needs callbacks.ema.EMA in trainer.callbacks; or set weights=live")

    def on_train_epoch_end(self, trainer: L.Trainer, module: Any) -> None:
        if (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self.export(trainer, module, iteration=module.iteration + 1)

    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
        if any(isinstance(c, GracefulStop) and c.leaving for c in trainer.callbacks):  # type: ignore[attr-defined]
            return  # time may be short, and the checkpoint is what counts
        if self._exported != module.iteration:  # the epoch counter has moved on
            self.export(trainer, module, iteration=module.iteration)

    def export(self, trainer: L.Trainer, module: Any, *, iteration: int) -> None:
        """Write `iteration-<iteration>`. Collective."""
        tensors = self._gather(trainer, module)
        if trainer.is_global_zero:
            target = self.dirpath / f"iteration-{iteration}"
            temporary = self.dirpath / f".{target.name}.tmp"
            for leftover in (temporary, target):
                shutil.rmtree(leftover, ignore_errors=True)
            temporary.mkdir(parents=True)
            module.policy.save(temporary, tensors)
            temporary.rename(target)
            trainer.print(f"exported {self.weights} weights to {target}")
            self._forget_old()
        self._exported = iteration
        trainer.strategy.barrier("export")

    def _gather(self, trainer: L.Trainer, module: Any) -> dict[str, Tensor]:
        """Whole trainable weights on the first process, empty elsewhere. Collective."""
        ema = self._ema(trainer)
        if self.weights == "ema" and ema is not None:
            return ema.averaged_weights(trainer, module)
        names = {name for name, _ in module.policy.trainable()}
        return {name: tensor for name, tensor in gathered(module.policy, names) if trainer.is_global_zero}

    def _ema(self, trainer: L.Trainer) -> EMA | None:
        return next((c for c in trainer.callbacks if isinstance(c, EMA)), None)  # type: ignore[attr-defined]

    def _forget_old(self) -> None:
        folders = sorted(self.dirpath.glob("iteration-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))
        for folder in folders[: -self.keep] if self.keep else []:
            shutil.rmtree(folder)
