"""Weights & Biases and SwanLab, both at once and offline, and trackio: their files hold options, numbers, and pictures with captions."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from toy import ToyData, toy_method, toy_trainer

from callbacks import trackers
from callbacks.sample_gallery import SampleGallery
from callbacks.trackers import SwanLab, Trackio, WandB
from lit_rl.errors import ConfigError


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, bytes, bytes]]:
    """The folder, and what W&B and SwanLab stored of one run."""
    import swanlab
    import wandb

    folder = tmp_path_factory.mktemp("tracked")
    loggers = [WandB(project="shop", name="first", save_dir=str(folder)), SwanLab(project="shop", name="first", save_dir=str(folder))]
    gallery = SampleGallery(max_images=2, folder=str(folder / "sheets"))
    trainer = toy_trainer(folder, callbacks=[gallery], logger=loggers, max_epochs=1)
    for logger in trainer.loggers:
        logger.log_hyperparams({"model": {"class_path": "some.Method", "lr": 0.25}})
    trainer.fit(toy_method(), ToyData())
    wandb.finish()
    swanlab.finish()
    ours, theirs = next(folder.glob("wandb/offline-run-*/*.wandb")), next(folder.glob("swanlog/run-*/*.swanlab"))
    yield folder, ours.read_bytes(), theirs.read_bytes()
    wandb.teardown()


def test_both_write_into_the_runs_folder_at_once(logged: tuple[Path, bytes, bytes]) -> None:
    folder, *stored = logged
    for data in stored:
        for part in (b"shop", b"first", b"reward_mean", b"\nbrightness 0."):
            assert part in data or part.replace(b"\n", rb"\n") in data, part
    assert len(list(folder.glob("wandb/offline-run-*/files/media/images/samples/*.png"))) == 2
    assert len(list(folder.glob("swanlog/run-*/media/image/*.png"))) == 2


def test_options_of_the_run_are_their_configuration(logged: tuple[Path, bytes, bytes]) -> None:
    folder, ours, _ = logged
    assert b"some.Method" in ours
    assert "some.Method" in next(folder.glob("swanlog/run-*/files/config.yaml")).read_text()


def test_trackio_keeps_a_run_and_goes_on_under_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder of this machine; a second run of the same name continues it."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when the package is imported
    for iterations in (1, 2):
        logger = Trackio(project="shop", name="first")
        logger.log_hyperparams({"model": {"class_path": "some.Method"}})
        gallery = SampleGallery(max_images=2, every_n_iterations=1)
        toy_trainer(tmp_path, callbacks=[gallery], logger=logger, max_epochs=iterations).fit(toy_method(), ToyData())
    with sqlite3.connect(tmp_path / "trackio/shop.db") as database:
        rows = database.execute("SELECT run_name, CAST(metrics AS TEXT) FROM metrics ORDER BY id").fetchall()
        configs = database.execute("SELECT CAST(config AS TEXT) FROM configs").fetchall()
    database.close()
    rewards = [json.loads(metrics)["reward_mean"] for _, metrics in rows if "reward_mean" in metrics]
    assert {name for name, _ in rows} == {"first"} and len(rewards) == 3 and len(configs) == 1 and "some.Method" in configs[0][0]
    assert "brightness 0." in "".join(metrics for _, metrics in rows)
    assert len(list((tmp_path / "trackio/media").rglob("*.png"))) == 6


@pytest.mark.parametrize("kind", [WandB, SwanLab])
def test_what_is_wrong_is_told_before_a_run_begins(kind: type[WandB | SwanLab], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="'sometimes' of .* is none of online, offline, disabled"):
        kind(mode="sometimes")  # type: ignore[arg-type]
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="is not installed: run `make setup`"):
        kind()
    with pytest.raises(ConfigError, match="trackio is not installed"):
        Trackio()
