"""A run of Weights & Biases, if it is installed: offline where nobody has given a key."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from typing import Any

log = logging.getLogger(__name__)
STEP = "trainer/global_step"
"""The step is a value: Weights & Biases drops what comes under a lower step than the last one, such as a late evaluation."""


class WandBRun:
    """One run."""

    def __init__(self, wandb: Any, run: Any) -> None:
        self._wandb, self._run = wandb, run
        run.define_metric("*", step_metric=STEP)

    @classmethod
    def begun(cls, **options: Any) -> WandBRun | None:
        """A new run; None, and a warning, where there can be none."""
        try:
            import wandb
        except ImportError:
            log.warning("wandb is not installed: nothing is reported there; pip install wandb")
            return None
        if not os.environ.get("WANDB_MODE") and not os.environ.get("WANDB_API_KEY") and not sys.stdin.isatty():
            log.warning("Weights & Biases has no WANDB_API_KEY: the run is kept offline, `wandb sync` sends it later")
            options["mode"] = "offline"
        try:
            return cls(wandb, wandb.init(**options))
        except Exception:
            log.warning("Weights & Biases could not begin; the run goes on without it", exc_info=True)
            return None

    def log(self, numbers: Mapping[str, float], step: int | None) -> None:
        """Numbers, of a step."""
        if numbers:
            self._run.log({**numbers, **({} if step is None else {STEP: step})})

    def alert(self, title: str, text: str) -> None:
        """A message that people are told."""
        self._run.alert(title=title, text=text or title)

    def config(self, config: Mapping[str, object]) -> None:
        """Options of the run."""
        self._run.config.update(dict(config), allow_val_change=True)

    def summary(self, summary: Mapping[str, object]) -> None:
        """The result of the run."""
        self._run.summary.update(dict(summary))

    def finish(self, exit_code: int) -> None:
        """End the run."""
        self._run.finish(exit_code=exit_code)
