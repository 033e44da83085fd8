"""The weights of the best evaluation, as other programs load them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import lightning as L

from callbacks.base import method_of
from callbacks.weight_folders import Held, WeightFolders
from lit_rl.errors import ConfigError


class BestModel(WeightFolders):
    """One folder with the weights of the best evaluation so far, in the format of an export: an adapter for PEFT and vLLM, or a model.

    It is written when an evaluation is better than every one before it, so the first of equals stays. A continued run knows the best.

    Args:
        dirpath: The folder; by default `best_model` in the run's folder.
        monitor: The number of an evaluation that is compared.
        mode: max where more is better, else min.
        weights: What training holds ("live") or the average of `callbacks.ema.EMA` ("ema").
    """

    def __init__(
        self,
        dirpath: str | None = None,
        *,
        monitor: str = "val/accuracy",
        mode: Literal["max", "min"] = "max",
        weights: Held = "live",
    ) -> None:
        super().__init__(dirpath or "best_model", weights=weights)
        self.monitor, self.mode = monitor, mode
        self.best: float | None = None

    @property
    def place(self) -> Path:
        """`dirpath` itself."""
        return self.dirpath

    @property
    def state_key(self) -> str:
        """The name of its state in checkpoints, of which a run with two bests has two."""
        return self._generate_state_key(monitor=self.monitor, mode=self.mode, weights=self.weights)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Write the weights if they are the best. Collective: all processes have the same number."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if self.monitor not in trainer.callback_metrics:
            there = ", ".join(sorted(name for name in trainer.callback_metrics if name.startswith("val/")))
            raise ConfigError(f"BestModel monitor={self.monitor}: the evaluation has no such number; it has {there or 'none'}")
        value = float(trainer.callback_metrics[self.monitor])
        sign = 1 if self.mode == "max" else -1
        if math.isnan(value) or (self.best is not None and sign * value <= sign * self.best):
            return
        self.best = value
        self.write(trainer, method_of(module), self.dirpath)

    def state_dict(self) -> dict[str, float | None]:
        """The best number, for checkpoints."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, float | None]) -> None:
        """Take over the best number of a run that is continued."""
        self.best = state_dict["best"]
