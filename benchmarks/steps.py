"""Files that a reader has to follow through a training step of a shipped recipe, as a profiler sees them.

    python -m benchmarks.steps

Prints for each recipe of RECIPES the files of ours whose functions `training_step` enters, but for those of `benchmarks.house.FORMULAS`.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import TypeVar
from unittest.mock import patch

import yaml
from torch import Tensor

from benchmarks.house import FORMULAS, ROOT
from lit_rl.types import Minibatch

T = TypeVar("T")


def entered(call: Callable[[], T]) -> tuple[T, set[str]]:
    """The result of `call`, and the files of ours whose functions it enters, but for FORMULAS."""
    found: set[str] = set()

    def look(frame: FrameType, event: str, _: object) -> None:
        file = Path(frame.f_code.co_filename)
        if event == "call" and file.is_relative_to(ROOT / "lit_rl"):
            found.add(".".join(file.relative_to(ROOT).with_suffix("").parts))

    sys.setprofile(look)
    try:
        result = call()
    finally:
        sys.setprofile(None)
    return result, {name for name in found if not name.startswith(FORMULAS)}


def grpo(folder: Path) -> dict[str, object]:
    """Sizes in place of those of `configs/grpo/qwen25_7b_gsm8k.yaml`."""
    from lit_rl.miniatures.lm import build_lm

    rows = [{"prompt": [{"role": "user", "content": "2+2?"}], "data_source": "gsm8k", "reward_model": {"ground_truth": "4"}}] * 4
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pretrained = str(build_lm(folder / "model", hidden=32, layers=1, heads=2))
    sizes = {"prompts_per_iteration": 4, "prompts_per_update": 4, "answers": {"sampling": {"max_new_tokens": 6}}}
    return {
        "model": {"init_args": sizes | {"policy": {"init_args": {"pretrained": pretrained}}}},
        "data": {"init_args": {"train": str(folder / "rows.jsonl"), "val": str(folder / "rows.jsonl")}},
    }


def flow_grpo(folder: Path) -> dict[str, object]:
    """Sizes in place of those of `configs/flow_grpo/sd35m_ocr.yaml`."""
    from lit_rl.miniatures.images import build_sd3

    for part in ("train", "test"):
        (folder / f"{part}.txt").write_text('a sign with "1"\na sign with "2"\n')
    pretrained = str(build_sd3(folder / "model", height=16, width=32, layers=2))
    policy = {"pretrained": pretrained, "resolution": [16, 32], "max_sequence_length": 8, "dtype": "bfloat16"}
    sizes = {"prompts_per_iteration": 2, "group_size": 2, "updates_per_iteration": 1, "train_micro_batch": 36}
    return {"model": {"init_args": sizes | {"policy": {"init_args": policy}}}, "data": {"init_args": {"train": str(folder)}}}


RECIPES: Mapping[str, tuple[str, Callable[[Path], dict[str, object]]]] = {
    "GRPO": ("grpo/qwen25_7b_gsm8k.yaml", grpo),
    "Flow-GRPO": ("flow_grpo/sd35m_ocr.yaml", flow_grpo),
}


def step_files(recipe: str) -> set[str]:
    """Files that `training_step` of a recipe enters in one iteration on a miniature, on one CPU process, with pseudo-random rewards."""
    from lit_rl.command_line.run import CLI
    from lit_rl.modules.base import LitRL

    seen: set[str] = set()
    step = LitRL.training_step

    def watched(self: LitRL, batch: Minibatch, batch_idx: int) -> Tensor:
        loss, files = entered(lambda: step(self, batch, batch_idx))
        seen.update(files)
        return loss

    path, small = RECIPES[recipe]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trainer = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "limit_val_batches": 0, "precision": "bf16-mixed"}
        trainer |= {"logger": False, "enable_progress_bar": False}
        run = {"dir": str(folder), "callbacks": dict.fromkeys(("progress", "learning_rate", "throughput", "samples", "newest"))}
        (folder / "small.yaml").write_text(yaml.safe_dump(small(folder) | {"trainer": trainer, "run": run}))
        argv = ["cli.py", "fit", "--config", str(ROOT / "configs" / path), "--config", str(folder / "small.yaml")]
        dry_run = patch.dict(os.environ, {"DISABLE_RL_REWARD_MODEL": "true"})
        with patch.object(sys, "argv", argv), patch.object(LitRL, "training_step", watched), dry_run:
            CLI()
    return seen


if __name__ == "__main__":
    for recipe in RECIPES:
        print(f"{recipe}: {' '.join(sorted(step_files(recipe)))}")
