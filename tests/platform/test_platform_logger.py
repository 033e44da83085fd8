"""A run of the command line reports by itself where JOB_UUID and PLATFORM_URL are set (the guide's 5.2.2, scenario 2)."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import requests
from jsonargparse import Namespace
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from served_platform import listening
from toy import ToyData, toy_method, toy_trainer
from toy_text import Digits, Sorted, model_folder, policy, trainer

from callbacks.platform_logger import PlatformLogger
from callbacks.reward_scoring import RewardScoring
from callbacks.sample_gallery import SampleGallery
from callbacks.sample_texts import SampleTexts
from lit_rl.command_line.usual import _report_to_platform
from lit_rl.errors import ConfigError
from lit_rl.methods.grpo import GRPO
from lit_rl.rewards.client import HTTPReward
from lit_rl.rollouts.answers import Answers
from lit_rl.rollouts.base import Sampling
from lit_rl.trackers.outbox import SETS, Outbox
from lit_rl.trackers.samples import BYTES, WIDEST, Sample, webp

CANONICAL_OF_FLOWS = {"policy_loss", "reward_mean", "clip_fraction"}


def loggers(given: object) -> list[tuple[str, dict[str, object]]]:
    trainer = Namespace(logger=given)
    _report_to_platform(trainer)
    found = trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]
    return [(spec.class_path.rpartition(".")[2], vars(spec.init_args)) for spec in found if spec]


def test_the_command_line_adds_the_logger_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Namespace(class_path="lightning.pytorch.loggers.CSVLogger", init_args=Namespace())
    for name in ("JOB_UUID", "PLATFORM_URL", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    assert loggers(own) == [("CSVLogger", {})]
    monkeypatch.setenv("JOB_UUID", "j")
    assert loggers(own) == [("CSVLogger", {})]
    monkeypatch.setenv("PLATFORM_URL", "http://127.0.0.1:9")
    assert loggers(own) == [("CSVLogger", {}), ("PlatformLogger", {"wandb": False})]
    assert loggers(False) == [("PlatformLogger", {"wandb": False})]
    monkeypatch.setenv("WANDB_PROJECT", "p")
    assert loggers(own)[1] == ("PlatformLogger", {"wandb": True})
    theirs = Namespace(class_path="callbacks.trackers.WandB", init_args=Namespace())
    assert loggers([theirs])[1] == ("PlatformLogger", {"wandb": False})  # one run there, not two


def test_a_run_reports_its_metrics_and_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file with the step at which it was written and what the evaluation of that step found; the brightest one is the best."""
    monkeypatch.chdir(tmp_path)
    with listening(tmp_path) as url:
        monkeypatch.setenv("JOB_UUID", "toy")
        monkeypatch.setenv("PLATFORM_URL", url)
        newest = ModelCheckpoint(dirpath=tmp_path / "checkpoints", save_last=True, every_n_epochs=1, save_on_train_epoch_end=True)
        watch = {"monitor": "val/brightness", "mode": "max", "save_top_k": 9, "save_on_train_epoch_end": False}
        keep: list[L.Callback] = [newest, ModelCheckpoint(tmp_path / "best", "{step}", **watch)]
        trainer = toy_trainer(
            tmp_path, callbacks=keep, max_epochs=3, enable_checkpointing=True, limit_val_batches=1.0, logger=PlatformLogger()
        )
        trainer.fit(toy_method(), ToyData())
        rows = requests.get(f"{url}/api/jobs/toy/metrics", timeout=60).json()
        bright = {r["step"]: r["val/brightness"] for r in requests.get(f"{url}/api/jobs/toy/metrics?split=eval", timeout=60).json()}
        job = requests.get(f"{url}/api/jobs/toy", timeout=60).json()
        found = requests.get(f"{url}/api/jobs/toy/checkpoints", timeout=60).json()
    assert len(rows) == 3 and all(isinstance(row[name], float) for row in rows for name in ("policy_loss", "reward_mean"))
    assert job["last_metrics"].keys() >= CANONICAL_OF_FLOWS and job["state"] == "succeeded"
    assert len(bright) == 3 and [one["step"] for one in found if "/best/" in one["path"]] == sorted(bright)
    assert all(one["eval_results"]["val/brightness"] == pytest.approx(bright[one["step"]], abs=1e-6) for one in found)
    assert [one["step"] for one in found if one["is_best"]] == [max(bright, key=lambda step: bright[step])]
    assert [one["step"] for one in found if one["path"].endswith("/last.ckpt")] == [max(bright)]


def test_the_platform_is_not_taken_for_a_reward_server(tmp_path: Path) -> None:
    """Both have port 8000 by default; a run must not find out at its first rewards."""
    with listening(tmp_path) as url, pytest.raises(ConfigError, match="such as the platform.* --port 8004.*REWARD_SERVER_URLS"):
        HTTPReward(outputs=["red"], urls=[url]).setup(rank=0, world_size=1, device="cpu")


def reported(url: str, step: int) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = requests.get(f"{url}/api/jobs/toy/samples?step={step}", timeout=60).json()["items"]
    return items


def test_pictures_of_a_run_come_with_their_rewards_and_its_progress_with_its_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reward is the picture's brightness, so what the gallery shows can be checked against its pixels."""
    monkeypatch.chdir(tmp_path)
    with listening(tmp_path) as url:
        monkeypatch.setenv("JOB_UUID", "toy")
        monkeypatch.setenv("PLATFORM_URL", url)
        gallery = SampleGallery(max_images=4, every_n_iterations=1)
        run = toy_trainer(
            tmp_path, callbacks=[gallery], max_epochs=3, logger=PlatformLogger(), limit_val_batches=1.0, check_val_every_n_epoch=3
        )
        run.fit(toy_method(updates_per_iteration=2, inner_epochs=2, warmup_steps=3), ToyData())
        progress = requests.get(f"{url}/api/jobs/toy", timeout=60).json()["progress"]
        assert (progress["step"], progress["max_steps"], progress["eta_s"]) == (run.global_step - 1, run.global_step - 1, 0.0)
        assert requests.get(f"{url}/api/jobs/toy/samples", timeout=60).json()["steps"] == [4, 6]
        items = reported(url, 4)
        assert len(items) == 4 and len({item["group"] for item in items}) == 4
        for item in items + reported(url, 6):
            picture = Image.open(io.BytesIO(requests.get(url + item["image_url"], timeout=60).content))
            assert item["rewards"]["brightness"] == pytest.approx(np.asarray(picture).mean() / 255, abs=0.03)  # WebP
            assert (item["advantage"] is None) == (item["source"] == "evaluation")
    assert {item["source"] for item in items} == {"rollout"}


def test_answers_of_a_run_come_with_their_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with listening(tmp_path) as url:
        monkeypatch.setenv("JOB_UUID", "toy")
        monkeypatch.setenv("PLATFORM_URL", url)
        learner = GRPO(
            policy(model_folder(tmp_path)), prompts_per_iteration=4, group_size=4, answers=Answers(sampling=Sampling(max_new_tokens=4))
        )
        run = trainer(callbacks=[RewardScoring({"sorted": Sorted()}), SampleTexts(3)], max_epochs=1, logger=PlatformLogger())
        run.fit(learner, datamodule=Digits())
        items = [item for item in reported(url, 0) if item["source"] == "rollout"]
    assert [item["kind"] for item in items] == ["text"] * 3 and len({(item["prompt"], item["group"]) for item in items}) == 1
    assert all(isinstance(item["text"], str) and item["rewards"] and isinstance(item["advantage"], float) for item in items)


def test_samples_wait_in_bounded_number_for_a_platform_that_is_away(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    away = Outbox("http://127.0.0.1:9", "j", token=None, spool=tmp_path / "unsent.jsonl")
    for step in range(SETS + 5):
        away.samples([Sample(step, "a", "rollout", picture=Image.new("RGB", (8, 8)))])
        assert len(away._samples) <= SETS
    away.close(0.1)
    assert f"{SETS + 5} others were dropped" in caplog.text and not (tmp_path / "unsent.jsonl").exists()


def test_pictures_are_made_small_enough() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (1400, 1400, 3), dtype=np.uint8))
    assert len(webp(noise)) <= BYTES and Image.open(io.BytesIO(webp(Image.new("L", (3 * WIDEST, 8))))).size[0] == WIDEST
