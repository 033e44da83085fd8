"""The demo of language models: its data are what they claim to be, and its pieces fit."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from lit_rl.demo.curves import read_curves
from lit_rl.demo.sorting import ACCURACY, best_and_worst, draw, prepare, summarize
from lit_rl.rewards.text.rules import RuleReward

ROOT = Path(__file__).parent.parent


def test_the_answers_to_imitate_are_what_the_rule_wants_and_held_out_numbers_are_new(tmp_path: Path) -> None:
    prepare(tmp_path, seed=0)
    train, val = ([json.loads(line) for line in (tmp_path / f"data/{name}.jsonl").read_text().splitlines()] for name in ("train", "val"))
    assert train[0].keys() == {"prompt", "response", "data_source", "reward_model"} and len(val) == 256
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in val}
    assert RuleReward().score([row["response"] for row in val], val)["score"].tolist() == [1.0] * len(val)
    assert RuleReward().score([f"#### {row['prompt'][:-1]}" for row in val], val)["score"].mean() < 0.1


def run(monkeypatch: pytest.MonkeyPatch, *args: str) -> None:
    from lit_rl.command_line.run import CLI

    monkeypatch.setattr(sys, "argv", ["cli.py", *args])
    CLI()


def test_its_stages_hand_over_what_the_next_one_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    out = Path("outputs/demo-llm")
    prepare(out, seed=0)
    fit = ["--trainer.max_epochs", "1", "--trainer.check_val_every_n_epoch", "1", "--data.init_args.max_train", "16"]
    few = [*fit, "--data.init_args.max_val", "8", "--model.init_args.prompts_per_iteration", "8"]
    sft = ["--config", str(ROOT / "configs/demo/sft_sort.yaml"), "--model.init_args.prompts_per_update", "4"]
    run(monkeypatch, "fit", *sft, *few)
    model = ["--model.init_args.policy.init_args.pretrained", str(out / "sft/export/iteration-1")]
    grpo = ["--config", str(ROOT / "configs/demo/grpo_sort.yaml"), *model, *few]
    run(monkeypatch, "fit", *grpo)
    run(monkeypatch, "predict", *grpo, "--ckpt_path", "last", "--texts.output_file", str(out / "answers.jsonl"))
    assert len((out / "answers.jsonl").read_text().splitlines()) == 8
    before, curves = read_curves(out / "sft/logs")[ACCURACY].values[-1], read_curves(out / "grpo/logs")
    summary = summarize(before, 0.75, curves, seconds={"warmup": 1.0, "rl": 2.0}, seed=0)
    assert summary["answers_trained"] == 64 and summary["held_out_accuracy"] == {"after_warmup": round(before, 4), "after_rl": 0.75}
    for known in (curves, {name: curve for name, curve in curves.items() if name in ("loss", "samples")}):
        draw(out / "demo.png", "GRPO", before, 0.75, known)
        assert (out / "demo.png").stat().st_size > 10_000


def test_a_pair_is_a_right_and_a_wrong_answer_to_the_same_prompt() -> None:
    rows = [{"prompt": p, "response": r} for p, r in (("21=", "#### 12"), ("30=", "#### 03"), ("54=", "#### 45"))]
    given = [("0", "#### 21"), ("1", "#### 03"), ("0", "#### 12"), ("2", ""), ("1", "#### 03"), ("2", "#### 45"), ("0", "12")]
    pairs = best_and_worst(rows, [{"id": row, "response": text} for row, text in given])
    assert pairs == [{"prompt": "21=", "chosen": "#### 12", "rejected": "#### 21"}]
