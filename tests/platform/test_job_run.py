"""A job made over REST is a real run: it stops with a checkpoint when it is asked to, and its successor goes on from there."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests
from served_platform import listening

from lit_rl.demo.sorting import prepare

SECONDS = 480.0


def until(true: Callable[[], Any]) -> Any:
    end = time.monotonic() + SECONDS
    while not (found := true()):
        assert time.monotonic() < end
        time.sleep(0.2)
    return found


def ask(url: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """The answer of POST with a body, of GET without."""
    answer = requests.get(url + path, timeout=60) if body is None else requests.post(url + path, json=body, timeout=60)
    assert answer.ok, answer.text
    return answer.json()


def steps(url: str, uuid: str) -> list[int]:
    """The steps whose losses a job has reported."""
    return [row["step"] for row in ask(url, f"/api/jobs/{uuid}/metrics") if "policy_loss" in row]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_job_stops_with_a_checkpoint_and_continues_at_the_same_step(tmp_path: Path) -> None:
    """The sorting demo's run on its own untrained model, one optimizer step of four groups of four answers an iteration."""
    prepare(tmp_path, seed=0)
    trainer = {"trainer.max_epochs": 4000, "trainer.num_sanity_val_steps": 0, "trainer.limit_val_batches": 0}
    small: dict[str, int] = {"model.init_args.prompts_per_iteration": 4, "model.init_args.group_size": 4}
    small["model.init_args.lr_scheduler.init_args.total_steps"] = 4001
    job = {
        "name": "sort", "algorithm": "grpo", "template": "configs/demo/grpo_sort.yaml", "model_path": str(tmp_path / "model"),
        "train_data_path": str(tmp_path / "data/train.jsonl"), "eval_data_path": str(tmp_path / "data/val.jsonl"),
        "num_gpus": 0, "overrides": trainer | small,
    }  # fmt: skip
    with listening(tmp_path, gpu_ids=()) as url:

        def begun(uuid: str) -> str:
            ask(url, f"/api/jobs/{uuid}/start", {})
            until(lambda: steps(url, uuid) or ask(url, f"/api/jobs/{uuid}")["state"] == "failed")
            return uuid

        def stopped(uuid: str, **how: Any) -> Any:
            ask(url, f"/api/jobs/{uuid}/stop", how)
            until(lambda: ask(url, f"/api/jobs/{uuid}")["state"] not in ("running", "stopping"))
            return ask(url, f"/api/jobs/{uuid}")

        first = begun(ask(url, "/api/jobs", job)["uuid"])
        end = stopped(first)
        assert (end["state"], end["exit"]["returncode"]) == ("stopped", 143), ask(url, f"/api/jobs/{first}/logs")["text"]
        assert end["progress"]["max_steps"] == 3999 and ask(url, f"/api/jobs/{first}/samples")["items"]
        assert (Path(end["run_dir"]) / "checkpoints/last.ckpt").exists()
        second = begun(ask(url, f"/api/jobs/{first}/resume", {"checkpoint": "last"})["uuid"])
        assert stopped(second, mode="now")["parent_uuid"] == first
        assert [*steps(url, first), *steps(url, second)] == list(range(len(steps(url, first)) + len(steps(url, second))))
