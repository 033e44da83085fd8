"""The smallest run of an agent from a YAML: two iterations of one task, once, in one world; stopped, continued, evaluated, done again."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lit_rl.miniatures.vlm import build_vlm
from lit_rl.replay.__main__ import main as replay

ROOT = Path(__file__).parents[2]


def run_of(model: Path) -> dict[str, Any]:
    tasks = str(ROOT / "configs/agent/tasks/buttons_eval.jsonl")
    return {
        "seed_everything": 1,
        "run": {"dir": "outputs", "name": "agent"},
        "model": {
            "class_path": "lit_rl.methods.agent_grpo.AgentGRPO",
            "init_args": {
                "policy": {
                    "class_path": "lit_rl.policies.vision_language.VisionLanguageModel",
                    "init_args": {"pretrained": str(model), "lora": {"rank": 4}},
                },
                "prompts_per_iteration": 1,
                "group_size": 1,
                "episodes": {
                    "worlds": {"class_path": "lit_rl.envs.tiny_desktop.TinyDesktops", "init_args": {"size": 64}},
                    "codec": {"class_path": "lit_rl.agents.tool_codecs.QwenComputerUse"},
                    "manner": {"max_turns": 9, "history": 1, "parse_penalty": 0.1},
                    "concurrency": 1,
                },
                "answers": {"engine": {"class_path": "lit_rl.rollouts.hf.HFEngine"}, "sampling": {"max_new_tokens": 4}},
                "kl": {"coef": 0.01},
                "credit": {"class_path": "lit_rl.credit.rules.Group", "init_args": {"min_std": 0.05}},
            },
        },
        "data": {"class_path": "datamodules.agent_tasks.AgentTasks", "init_args": {"train": tasks, "val": tasks, "eval_batch_size": 4}},
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "limit_val_batches": 1,
            "enable_model_summary": False,
            "callbacks": [{"class_path": "callbacks.episode_records.EpisodeRecords", "init_args": {"strips": 1}}],
        },
    }


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:model.group_size=1")
def test_the_smallest_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from lit_rl.command_line.run import CLI

    model = build_vlm(tmp_path / "model", family="qwen3_vl", hidden=32, layers=1, vision_hidden=32, vision_layers=1, max_side=64)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run_of(model)))
    monkeypatch.chdir(tmp_path)

    def go(*argv: str) -> Any:
        monkeypatch.setattr(sys, "argv", ["cli.py", argv[0], "--config", "run.yaml", *argv[1:]])
        return CLI()

    folder = tmp_path / "outputs/agent"
    assert go("fit").trainer.global_step == 1
    assert "  success 0  " in capsys.readouterr().out
    again = go("fit", "--ckpt_path", "last", "--trainer.max_epochs", "2")
    assert again.trainer.global_step == 2
    rows = [json.loads(line) for line in (folder / "episodes/rollouts.jsonl").read_text().splitlines()][1:]
    assert [(row["iteration"], row["stage"]) for row in rows] == [(i, stage) for i in (1, 2) for stage in ("train", *["eval"] * 4)]
    assert {len(row["turns"]) for row in rows} == {3} and len(list((folder / "episodes/film").glob("*.png"))) == 3
    assert replay([str(folder / "episodes/rollouts.jsonl"), "--limit", "4"]) == 0
    assert "4 of 4 episodes went as before" in capsys.readouterr().out
    metrics = {name: float(value) for name, value in again.trainer.callback_metrics.items()}
    assert metrics["val/accuracy"] == 0.0 and metrics["val/turns"] == 3.0 and metrics["reward/format"] == pytest.approx(-0.3)
    assert torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 2
    go("validate", "--ckpt_path", "last")
