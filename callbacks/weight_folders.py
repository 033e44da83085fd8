"""Folders of weights that other programs load: the part that callbacks share which write some."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import lightning as L
from torch import Tensor

from callbacks.base import Method, RLCallback, callbacks_of, method_of
from callbacks.ema import EMA
from lit_rl.checkpoints.ip_adapter import Format
from lit_rl.checkpoints.manifest import entries, write_manifest
from lit_rl.checkpoints.replacing import beside, naming, put_in_place, remove, swept
from lit_rl.errors import ConfigError
from lit_rl.policies.weights.shards import gathered_on_first

Held = Literal["live", "ema"]
"""The weights that training holds, or the average of `callbacks.ema.EMA`."""


class WeightFolders(RLCallback):
    """Writes folders as the policy's `save` does, whole or not at all, with the checksums of their files in `manifest.json`.

    Weights are gathered one tensor at a time on all processes; the first one keeps and writes them. A subclass says when.

    Args:
        dirpath: The folder of all that it writes.
        weights: The weights that training holds ("live") or the average of `callbacks.ema.EMA` ("ema").
        format: A format that the policy's `save` knows; its own by default.
    """

    def __init__(self, dirpath: str, *, weights: Held, format: Format | None = None) -> None:
        self.dirpath, self.weights = Path(dirpath), weights
        self.format: Format | None = format

    @property
    @abstractmethod
    def place(self) -> Path:
        """The folder that it writes, of many the name with its placeholders."""

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        """Refuse an average without EMA, and a folder that two callbacks write."""
        mine = type(self).__name__
        if self.weights == "ema" and self._ema(trainer) is None:
            raise ConfigError(f"{mine} weights=ema needs callbacks.ema.EMA in trainer.callbacks; or set weights=live")
        for other in callbacks_of(trainer, WeightFolders):  # type: ignore[type-abstract]
            if other is not self and other.place == self.place:
                raise ConfigError(f"{type(other).__name__} and {mine} write {self.place}: give one of them another dirpath")

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Refuse a format that the policy does not write."""
        if self.format:
            method_of(module).policy.check_format(self.format)

    def write(self, trainer: L.Trainer, module: Method, target: Path) -> None:
        """Write one folder, in the place of an older one of its name. Collective."""
        tensors = self._gather(trainer, module)
        if trainer.is_global_zero:
            swept(target, lambda path: False)  # half of an export is of no use
            with naming(target):
                self._save(module, tensors, target)
            trainer.print(f"exported {self.weights} weights to {target}")
        trainer.strategy.barrier("export")

    def _save(self, module: Method, tensors: dict[str, Tensor], target: Path) -> None:
        temporary = beside(target)
        try:
            temporary.mkdir(parents=True)
            module.policy.save(temporary, tensors, **({"format": self.format} if self.format else {}))
            write_manifest(temporary, [entries(temporary, 0, 1)])
            put_in_place(temporary, target)
        finally:
            remove(temporary)

    def _gather(self, trainer: L.Trainer, module: Method) -> dict[str, Tensor]:
        """Whole trainable weights on the first process, empty elsewhere. Collective."""
        ema = self._ema(trainer)
        if self.weights == "ema" and ema is not None:
            return ema.averaged_weights(trainer, module)
        with ema.live(module) if ema else nullcontext():
            return dict(gathered_on_first(module.policy, {name: weight.dtype for name, weight in module.policy.trainable()}))

    def _ema(self, trainer: L.Trainer) -> EMA | None:
        return next(iter(callbacks_of(trainer, EMA)), None)
