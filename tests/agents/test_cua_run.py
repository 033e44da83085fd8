"""configs/agent/cua_grpo.yaml: the guide's values, and its minimal run on a miniature in boxes of a service of our own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fake_gbox import TOKEN, gbox_in_thread

from lit_rl.doctor.runs import parse
from lit_rl.miniatures.vlm import build_vlm

ROOT = Path(__file__).parents[2]
YAML = ROOT / "configs/agent/cua_grpo.yaml"


def test_values_are_the_guides() -> None:
    run = parse(["--config", str(ROOT / "configs/base/fsdp.yaml"), "--config", str(YAML)])
    model, trainer = run.model.init_args, run.trainer
    policy, lora = model.policy.init_args, model.policy.init_args.lora
    assert (policy.pretrained, lora.rank, lora.alpha, len(lora.targets)) == ("Qwen/Qwen3-VL-32B-Instruct", 16, 32.0, 7)
    assert (model.prompts_per_iteration, model.group_size) == (4 * 4, 4)  # 4 tasks on each of plan A's GPUs
    assert (model.optimizer.init_args.lr, model.optimizer.init_args.weight_decay, trainer.gradient_clip_val) == (1e-5, 0.01, 1.0)
    assert (trainer.max_epochs, trainer.check_val_every_n_epoch, model.lr_scheduler.init_args.warmup_steps) == (200, 10, 10)
    assert (model.kl.coef, model.surrogate.init_args.low, model.credit.init_args.min_std) == (0.01, 0.2, 0.05)
    worlds, manner = model.episodes.worlds.init_args, model.episodes.manner
    assert (worlds.box_type, worlds.create_timeout, worlds.expires_in, worlds.screenshot_delay) == ("android", "60s", "15m", 0.3)
    assert (manner.max_turns, manner.action_delay_s, model.episodes.concurrency) == (15, 0.5, 4)
    sampling = model.answers.sampling
    assert (manner.max_prompt_tokens + sampling.max_new_tokens, sampling.max_new_tokens, sampling.temperature) == (16384, 2048, 0.7)
    engine = model.answers.engine.init_args
    assert (engine.urls, engine.timeout_s, engine.deadline_s) == (None, 120.0, 4 * 120.0)  # a try and three more
    (keeper,) = [c.init_args for c in trainer.callbacks if c.class_path.endswith("ModelCheckpoint")]
    assert (keeper.save_top_k, keeper.every_n_epochs, keeper.dirpath) == (5, 10, "outputs/grpo_cua/checkpoints")
    (early,) = [c.init_args for c in trainer.callbacks if c.class_path.endswith("EarlyStopping")]
    assert (early.monitor, early.patience, early.stopping_threshold) == ("val/accuracy", 5, 0.9)


def minimal(folder: Path, model: Path, url: str) -> dict[str, Any]:
    """The guide's minimal test run: 2 steps, one task, one rollout, one at a time, saved and evaluated at each step."""
    run: dict[str, Any] = yaml.safe_load(YAML.read_text())
    method, tasks = run["model"]["init_args"], folder / "tasks.jsonl"
    method["policy"]["init_args"] |= {"pretrained": str(model), "dtype": "float32", "lora": {"rank": 4}}
    method |= {"prompts_per_iteration": 1, "group_size": 1, "micro_batch_tokens": 2048}
    method["episodes"] |= {"concurrency": 1}
    method["episodes"]["worlds"]["init_args"] |= {"box_type": "linux", "base_url": url, "screenshot_delay": 0.0}
    method["episodes"]["manner"] |= {"max_turns": 3, "max_prompt_tokens": 2000, "action_delay_s": 0.0}
    method["answers"] = {"engine": {"class_path": "lit_rl.rollouts.hf.HFEngine"}, "sampling": {"max_new_tokens": 4}}
    tasks.write_text("".join((ROOT / "configs/agent/tasks/gbox_desktop_eval.jsonl").read_text().splitlines(keepends=True)[:1]))
    run["data"]["init_args"] = {"train": str(tasks), "val": str(tasks)}
    run["run"]["callbacks"]["newest"] |= {"every_n_epochs": 1, "save_top_k": 1}
    run["trainer"] |= {"accelerator": "cpu", "devices": 1, "precision": "32-true", "max_epochs": 2, "check_val_every_n_epoch": 1}
    next(c for c in run["trainer"]["callbacks"] if c["class_path"].endswith("Export"))["init_args"]["keep"] = 1
    return run


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:model.group_size=1")
def test_the_guides_minimal_run_finishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Continued from the folder that the guide names, and stopped early at a target that each evaluation reaches."""
    from lit_rl.command_line.run import CLI

    model = build_vlm(tmp_path / "model", family="qwen3_vl", hidden=32, layers=1, vision_hidden=32, vision_layers=1, max_side=64)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GBOX_API_KEY", TOKEN)

    def fit(*options: str, target: float) -> Any:
        next(c for c in run["trainer"]["callbacks"] if c["class_path"].endswith("EarlyStopping"))["init_args"]["stopping_threshold"] = (
            target
        )
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
        monkeypatch.setattr(sys, "argv", ["cli.py", "fit", "--config", "run.yaml", *options])
        return CLI().trainer

    folder = tmp_path / "outputs/grpo_cua"
    with gbox_in_thread() as gbox:
        run = minimal(tmp_path, model, gbox.url)
        assert fit(target=0.9).global_step == 2
        kept = ["checkpoint-2", "checkpoint-2.ckpt", "last.ckpt"]  # save_total_limit is 1
        assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == kept
        best = (folder / "best_model/manifest.json").stat().st_mtime_ns
        run["trainer"]["max_epochs"] = 4
        again = fit("--ckpt_path", "outputs/grpo_cua/checkpoints/checkpoint-2", target=-1.0)
        assert again.global_step == 3 and not gbox.running
    assert (folder / "best_model/manifest.json").stat().st_mtime_ns == best  # 0 is not better than 0
    for adapter in (folder / "best_model", folder / "checkpoints/checkpoint-3"):
        assert loads_in_peft(adapter, model)
    training, rollouts = ((folder / "logs" / f"{name}.log").read_text() for name in ("training", "rollouts"))
    told = [f"iteration {i}/{last} step {i}: " in training for i, last in ((1, 2), (2, 2), (3, 4))]
    assert all(told) and training.count("val/accuracy=0 ") == 3
    rows = [json.loads(line) for line in (folder / "episodes/rollouts.jsonl").read_text().splitlines()[1:]]
    assert len(rows) == 6 == len(rollouts.splitlines())
    told = [f"iteration={row['iteration']} {row['stage']} task={row['task']['id']} group=" in rollouts for row in rows]
    assert all(told) and rollouts.count("status=parse_error") == sum(row["status"] == "parse_error" for row in rows)


def loads_in_peft(adapter: Path, base: Path) -> bool:
    from peft import PeftModel, get_peft_model_state_dict
    from transformers import AutoModelForImageTextToText

    loaded = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), adapter)
    return all(torch.isfinite(weight).all() for weight in get_peft_model_state_dict(loaded).values())
