"""Pull the plug at a random moment, continue with `--ckpt_path last`: the run ends as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from forked import end_group, ended, forked_script
from toy import toy_config

EPOCHS = 30

ROOT = Path(__file__).parent.parent


class Die(L.Callback):
    """SIGKILL before the first minibatch after optimizer step $DIE."""

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == int(os.environ.get("DIE", -1)):
            os.kill(os.getpid(), signal.SIGKILL)


def config(folder: Path) -> dict[str, Any]:
    """Warm-up, several minibatches and passes per rollout, KL, dropout, EMA, statistics; a checkpoint at every step."""
    run = toy_config(
        folder, supervised={"warmup_steps": 4}, updates_per_iteration=4, inner_epochs=2, kl={"coef": 0.1}, advantage={"kind": "history"}
    )
    run["model"]["init_args"]["policy"] = {"class_path": "toy.ToyPolicy", "init_args": {"dropout": 0.1}}
    run["trainer"] |= {"max_epochs": EPOCHS, "accumulate_grad_batches": 2, "gradient_clip_val": 1.0, "limit_val_batches": 0}
    checkpoint = {"dirpath": str(folder / "checkpoints"), "filename": "{step}", "save_top_k": 3, "monitor": "step", "mode": "max"}
    run["trainer"]["callbacks"][1:] = [
        {"class_path": "callbacks.ema.EMA", "init_args": {"decay": 0.9}},
        {"class_path": "test_kill_and_resume.Die"},
        {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": checkpoint | {"save_last": True, "every_n_train_steps": 1},
        },
    ]
    return run


def start(folder: Path, *options: str, die: int = -1) -> BaseProcess:
    folder.mkdir(exist_ok=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(config(folder)))
    words = [str(ROOT / "cli.py"), "fit", "--config", str(folder / "run.yaml"), *options]
    return forked_script(*words, folder=folder, environment=os.environ | {"DIE": str(die)})


def finish(process: BaseProcess, folder: Path) -> dict[str, Any]:
    assert ended(process, timeout=200) == 0, (folder / "log").read_text()[-3000:]
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def differences(a: Any, b: Any, at: str = "") -> list[str]:
    """Paths of leaves that are not bitwise equal."""
    if isinstance(a, dict):
        return [d for k in a.keys() | b.keys() for d in differences(a.get(k), b.get(k), f"{at}/{k}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f"{at}/{i}")]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b
    return [] if same else [at]


@pytest.mark.slow
def test_killed_run_ends_as_the_unbroken_one(tmp_path: Path) -> None:
    unbroken = start(tmp_path / "unbroken")
    folder, moment = tmp_path / "killed", random.Random(time.time_ns())
    last = 4 + EPOCHS // 2  # of an iteration, of the warm-up, or inside of one; each start goes on from the one before
    first, second = sorted(moment.sample(range(1, last), 2))
    for options, step in (((), first), (("--ckpt_path", "last"), second)):
        assert ended(start(folder, *options, die=step), timeout=200) == -signal.SIGKILL, (folder / "log").read_text()[-3000:]
    killed = start(folder, "--ckpt_path", "last")
    there = time.monotonic() + 200
    while killed.exitcode is None and not (folder / "checkpoints" / f"step={second + 2}.ckpt").exists() and time.monotonic() < there:
        time.sleep(0.005)
    time.sleep(moment.uniform(0.0, 0.5))  # at no particular moment, while a file is written perhaps
    end_group(killed)
    killed = start(folder, "--ckpt_path", "last")
    a, b = finish(unbroken, tmp_path / "unbroken"), finish(killed, folder)
    parts = [
        part
        for part in ("state_dict", "optimizer_states", "lr_schedulers", "ema", "prompt_history", "rng", "global_step", "epoch")
        if part in a
    ]
    assert {"state_dict", "optimizer_states", "ema", "prompt_history", "rng", "global_step"} <= set(parts)
    assert [d for part in parts for d in differences(a[part], b[part], part)] == [], (first, second)
    assert a["epoch"] == EPOCHS - 1
