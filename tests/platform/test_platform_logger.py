"""A run of the command line reports by itself where JOB_UUID and PLATFORM_URL are set (the guide's 5.2.2, scenario 2)."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import requests
from jsonargparse import Namespace
from lightning.pytorch.callbacks import ModelCheckpoint
from served_platform import listening
from toy import ToyData, toy_method, toy_trainer

from callbacks.platform_logger import PlatformLogger
from lit_rl.command_line.usual import _report_to_platform

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
    monkeypatch.chdir(tmp_path)
    with listening(tmp_path) as url:
        monkeypatch.setenv("JOB_UUID", "toy")
        monkeypatch.setenv("PLATFORM_URL", url)
        keep: L.Callback = ModelCheckpoint(dirpath=tmp_path / "checkpoints", save_last=True, every_n_epochs=1, save_on_train_epoch_end=True)
        trainer = toy_trainer(tmp_path, callbacks=[keep], max_epochs=2, enable_checkpointing=True, logger=PlatformLogger())
        trainer.fit(toy_method(), ToyData())
        rows = requests.get(f"{url}/api/jobs/toy/metrics", timeout=60).json()
        job = requests.get(f"{url}/api/jobs/toy", timeout=60).json()
        checkpoints = requests.get(f"{url}/api/jobs/toy/checkpoints", timeout=60).json()
    assert len(rows) == 2 and all(isinstance(row[name], float) for row in rows for name in ("policy_loss", "reward_mean"))
    assert job["last_metrics"].keys() >= CANONICAL_OF_FLOWS and job["state"] == "succeeded"
    assert checkpoints and all(found["path"].endswith(".ckpt") for found in checkpoints)
