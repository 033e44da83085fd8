"""A run with an evaluation set, in one process or several."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from cpu_strategies import CPUZeroStrategy
from toy import ToyData, toy_method, toy_trainer

from callbacks.evaluation_sets import EvaluationSets, SetDefaults
from lit_rl.rewards.judges.client import Judge
from lit_rl.strategies.fsdp2 import FSDP2Strategy


def fit(folder: str, yaml: str, url: str, strategy: str = "ddp") -> dict[str, float]:
    """Numbers of the evaluation at the end of an iteration."""
    devices = int(os.environ.get("WORLD_SIZE", "1"))
    sets = EvaluationSets(yaml, defaults=SetDefaults(num_steps=2), judge=Judge(urls=url, temperature=None), folder=f"{folder}/eval")
    strategies: dict[str, Any] = {
        "ddp": lambda: "ddp", "fsdp2": lambda: FSDP2Strategy(save_distributed_checkpoint=False), "zero2": lambda: CPUZeroStrategy(stage=2),
    }  # fmt: skip
    chosen = "auto" if devices == 1 else strategies[strategy]()
    run = toy_trainer(Path(folder), callbacks=[sets], devices=devices, strategy=chosen, max_epochs=1, limit_val_batches=1.0)
    run.fit(toy_method(prompts_per_iteration=6), ToyData(held_out=1))
    return {name: float(value) for name, value in run.callback_metrics.items() if name.startswith(("eval/", "val/"))}
