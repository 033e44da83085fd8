"""What the command line leaves out of its imports is there for a user's callback."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

from lit_rl.command_line.imports import quick_imports
from lit_rl.miniatures.lm import build_lm

ROOT = Path(__file__).parents[2]
RUN = """
model:
  class_path: lit_rl.methods.sft.SFT
  init_args:
    policy: {class_path: lit_rl.policies.causal_lm.CausalLM, init_args: {pretrained: lm}}
    prompts_per_iteration: 2
data: {class_path: datamodules.supervised.SupervisedText, init_args: {train: rows.jsonl, prompt_key: p, response_key: r}}
trainer: {accelerator: cpu, devices: 1, max_epochs: 1, limit_val_batches: 0, callbacks: [{class_path: own.Draws}]}
run: {dir: runs}
"""
OWN = """
import sys

import lightning as L
import torch
from torchmetrics import MeanMetric
from torchmetrics.text.bert import BERTScore
from torchmetrics.utilities.plot import plot_curve


class Draws(L.Callback):
    def on_train_end(self, trainer, pl_module):
        assert "matplotlib" not in sys.modules
        metric = MeanMetric()
        metric.update(2.0)
        figure, axes = metric.plot()
        figure.savefig("mean.png")
        figure, axes = plot_curve((torch.linspace(0, 1, 5), torch.rand(5)))
        figure.savefig("curve.png")
        score = BERTScore(model_name_or_path="lm", num_layers=1)
        score.update(["a b"], ["a c"])
        print("bert", {name: value.tolist() for name, value in score.compute().items()})
"""


def test_a_users_callback_plots_and_scores_with_torchmetrics(tmp_path: Path) -> None:
    build_lm(tmp_path / "lm", vocab_size=128, hidden=32, layers=1)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"p": "a", "r": "b"}) + "\n" for _ in range(2)))
    (tmp_path / "run.yaml").write_text(RUN)
    (tmp_path / "own.py").write_text(OWN)
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"}
    command = [sys.executable, str(ROOT / "cli.py"), "fit", "--config", "run.yaml"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "bert {'precision'" in done.stdout
    for name in ("mean.png", "curve.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_garbage_is_collected_again_also_after_an_error() -> None:
    assert gc.isenabled()
    try:
        with quick_imports():
            assert not gc.isenabled()
            raise ImportError("no such module")
    except ImportError:
        assert gc.isenabled()
    gc.unfreeze()
