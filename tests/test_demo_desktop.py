"""The demo of agents: its demonstrations are right, in words that its model knows, and its pieces fit."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from lit_rl.agents.records import read_records
from lit_rl.demo.curves import read_curves
from lit_rl.demo.desktop import ACCURACY, SIZE, draw, films, prepare, summarize
from lit_rl.demo.stages import exported
from lit_rl.envs.desktop import COLOURS
from lit_rl.policies.vision_language import VisionLanguageModel

ROOT = Path(__file__).parent.parent
OUT = Path("outputs/demo-agent")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the shipped task files, and the demo's model and demonstrations in it."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    prepare(OUT, seed=0, demonstrations=32)
    return tmp_path


def test_what_is_imitated_are_clicks_on_the_button_in_words_of_one_token(home: Path) -> None:
    policy = VisionLanguageModel(str(OUT / "model"))
    rows = [json.loads(line) for line in (OUT / "data/train.jsonl").read_text().splitlines()]
    assert len(rows) == 64  # two hits of each task
    for row in rows:
        asked, answer = row["messages"][0]["content"][1]["text"], row["messages"][1]["content"]
        assert policy.decode(ids := policy.encode(answer)) == answer and len(ids) == 3
        x, y = (int(word) for word in answer.split()[1:])
        colour = Image.open(OUT / "data" / row["images"][0]).getpixel(((2 * x + 1) * SIZE // 6, (2 * y + 1) * SIZE // 6))
        assert colour == COLOURS[asked.split()[1]]


def run(monkeypatch: pytest.MonkeyPatch, *args: str) -> None:
    from lit_rl.command_line.run import CLI

    monkeypatch.setattr(sys, "argv", ["cli.py", *args])
    CLI()


def test_its_stages_hand_over_what_the_next_one_needs(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = ["--trainer.max_epochs", "1", "--trainer.check_val_every_n_epoch", "1"]
    sft = ["--model.init_args.prompts_per_iteration", "16", "--model.init_args.prompts_per_update", "8"]
    run(monkeypatch, "fit", "--config", "configs/demo/agent_sft.yaml", *few, *sft)
    shutil.copytree(exported(OUT / "sft"), OUT / "warm_start")
    eight = ["--data.init_args.repeat_val", "1", "--data.init_args.eval_batch_size", "8", "--trainer.limit_val_batches", "1"]
    run(monkeypatch, "validate", "--config", "configs/demo/agent_grpo.yaml", "--run.name", "before", *eight)
    small = ["--model.init_args.prompts_per_iteration", "2", "--model.init_args.group_size", "2", *eight, *few]
    for method in ("grpo", "lora"):
        run(monkeypatch, "fit", "--config", f"configs/demo/agent_{method}.yaml", *small)
        before, curves = read_curves(OUT / "before/logs")[ACCURACY].values[-1], read_curves(OUT / method / "logs")
        played = read_records(OUT / method / "episodes/rollouts.jsonl")[1]
        summary = summarize(before, curves, played, seconds={"warmup": 1.0, "rl": 2.0}, seed=0)
        assert summary["episodes_trained"] == 4 and len(played) == 12
        assert summary["held_out_accuracy"] == {"after_warmup": before, "after_rl": curves[ACCURACY].values[-1]}
        draw(OUT / "demo.png", "GRPO", before, curves, [films(OUT / name / "episodes/film") for name in ("before", method)])
        assert (OUT / "demo.png").stat().st_size > 10_000
    assert (exported(OUT / "lora") / "adapter_model.safetensors").is_file() and (exported(OUT / "grpo") / "model.safetensors").is_file()
