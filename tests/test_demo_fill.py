"""The demo of inpainting: its data are what they claim to be, and its pieces fit."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from datamodules.inpainting import Inpainting
from lit_rl.demo.pictures import filled_signs
from lit_rl.demo.signs import HEIGHT, HOLE, LEFT, TOP, WIDTH, write_signs
from lit_rl.demo.tasks import TASKS
from lit_rl.rewards.ink import InkReward
from lit_rl.rewards.ocr import OCRReward

ROOT = Path(__file__).parent.parent


def scores(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """OCR and ink similarity of the targets of the training items."""
    data = Inpainting(str(path), resolution=(HEIGHT, WIDTH), style_dropout=0)
    rows, targets = data.examples(0, 24)
    return OCRReward().score(targets, rows)["ocr_similarity"], InkReward().score(targets, rows)["ink_similarity"]


@pytest.mark.parametrize("lines", [0.0, 1.0])
@pytest.mark.parametrize("wrong_ink", [0.0, 1.0])
def test_rewards_see_the_defects_and_nothing_else(lines: float, wrong_ink: float, tmp_path: Path) -> None:
    """So what the warm-up learns wrong is what the rewards correct."""
    text, ink = scores(write_signs(tmp_path, train=24, held_out=1, lines_share=lines, wrong_ink_share=wrong_ink))
    assert text.min() == 1 if lines == 0 else text.mean() < 0.3
    assert ink.mean() > (0.5 if lines else 0.85) if wrong_ink == 0 else ink.max() < 0.4


def test_held_out_signs_are_of_other_numbers_and_the_same_for_every_seed(tmp_path: Path) -> None:
    folders = [write_signs(tmp_path / str(seed), train=160, held_out=20, lines_share=0.5, seed=seed).parent for seed in (0, 1)]
    items = [json.loads((folder / "items.json").read_text())["items"] for folder in folders]
    assert items[0] == items[1]
    train, val = ({item["text"] for item in items[0] if item["split"] == split} for split in ("train", "val"))
    assert len(train) == 80 and len(val) == 20 and not train & val
    for item in items[0]:
        for field in ("source", "target", "reference"):
            same = len({(folder / "images" / item[field]).read_bytes() for folder in folders}) == 1
            assert same or item["split"] == "train"
    assert (folders[0] / "images/train-0000-source.png").read_bytes() != (folders[1] / "images/train-0000-source.png").read_bytes()


def test_sheet_shows_what_is_given_and_what_was_made_of_it(tmp_path: Path) -> None:
    """The number, the picture with its hole, the reference and the picture of each stage, here the target."""
    items = json.loads(write_signs(tmp_path, train=1, held_out=3).read_text())["items"]
    for stage in ("after_warmup", "after_rl"):
        (tmp_path / "images" / stage).mkdir()
        rows = [{"file": f"../{item['target']}"} for item in items if item["split"] == "val"]
        (tmp_path / "images" / stage / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    [(title, sheet)] = filled_signs(tmp_path, {"after_warmup": 0.5, "after_rl": 1.0})
    assert "after the warm-up (50% right), after RL (100% right)" in title
    target = Image.open(tmp_path / "images" / items[1]["target"]).convert("RGB")
    zoom, label, gap = 3, 32, 4
    width, height = WIDTH * zoom, HEIGHT * zoom
    results = label + width + gap + HOLE[1] * zoom + gap
    for x in (results, results + width + gap):
        assert sheet.crop((x, 0, x + width, height)).tobytes() == target.resize((width, height), Image.Resampling.NEAREST).tobytes()
    hole = sheet.crop((label, 0, label + width, height)).getpixel((zoom * (LEFT + 1), zoom * (TOP + 1)))
    assert hole in ((255, 255, 255), (150, 150, 150))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["grpo", "nft"])
def test_pieces_fit(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped YAML on the demo's own model and signs: one warm-up step, one iteration, an evaluation, an export."""
    from lit_rl.command_line.run import CLI

    task = TASKS["fill"]
    run = task.runs[method]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DISABLE_RL_REWARD_MODEL", "true")
    task.prepare(run.out, 0)
    model: dict[str, Any] = {
        "supervised.warmup_steps": 1,
        "prompts_per_iteration": 2,
        "group_size": 2,
        "num_steps": 4,
        "evaluation.num_steps": 2,
    }
    changed = [f"--model.init_args.{key}={value}" for key, value in model.items()]
    changed += ["--data.init_args.max_val=4", "--trainer.max_epochs=2", "--trainer.check_val_every_n_epoch=1"]
    monkeypatch.setattr(sys, "argv", ["cli.py", "fit", "--config", str(ROOT / run.config), *changed])
    module = CLI().model
    assert module.iteration == 1
    assert list(run.out.glob("export/*/ip-adapter.bin")) and list(run.out.glob("export/*/transformer/*.safetensors"))
    assert (run.out / "checkpoints/last.ckpt").exists() and list(run.out.rglob("events.out.tfevents.*"))
