"""Exported folders hold the weights they name, whole, and only the newest stay."""

from pathlib import Path
from typing import Any

import pytest
import torch
from toy import ToyData, ToyPolicy, toy_method, toy_trainer

from callbacks.ema import EMA
from callbacks.export import Export
from lit_rl.errors import ConfigError


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def read(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "weights.pt", weights_only=True)


def test_writes_live_weights_after_each_iteration_and_keeps_the_newest(tmp_path: Path) -> None:
    """10 iterations of which the last 2 are kept: 10 is newer than 9, not between 1 and 2."""
    module = toy_method()
    toy_trainer(tmp_path, callbacks=[Export(str(tmp_path / "out"), keep=2)], max_epochs=10).fit(module, ToyData())
    assert names(tmp_path / "out") == ["iteration-10", "iteration-9"]
    live = dict(module.policy.trainable())
    exported = read(tmp_path / "out" / "iteration-10")
    assert exported.keys() == live.keys() and all(torch.equal(exported[name], live[name]) for name in live)
    assert not all(torch.equal(read(tmp_path / "out" / "iteration-9")[name], live[name]) for name in live)


def test_writes_the_average(tmp_path: Path) -> None:
    average = EMA(decay=0.9)
    trainer, module = toy_trainer(tmp_path, callbacks=[Export(str(tmp_path / "out"), weights="ema"), average]), toy_method()
    trainer.fit(module, ToyData())
    exported, held = read(tmp_path / "out" / "iteration-2"), average.averaged_weights(trainer, module)
    assert all(torch.equal(exported[name], held[name]) for name in held)
    assert not all(torch.equal(exported[name], p) for name, p in module.policy.trainable())


def test_the_end_is_exported_whatever_the_interval(tmp_path: Path) -> None:
    """A warm-up and 4 iterations, every second epoch: after iterations 1 and 3, and the end."""
    export = Export(str(tmp_path / "out"), every_n_epochs=2, keep=None)
    toy_trainer(tmp_path, callbacks=[export], max_epochs=5).fit(toy_method(warmup_steps=2), ToyData())
    assert names(tmp_path / "out") == ["iteration-1", "iteration-3", "iteration-4"]


class SecondSaveFails(ToyPolicy):
    saves = 0

    def save(self, folder: Path, weights: dict[str, Any]) -> None:
        super().save(folder, weights)
        self.saves += 1
        if self.saves == 2:
            raise OSError("No space left on device")


def test_a_failed_export_is_not_taken_for_one(tmp_path: Path) -> None:
    module = toy_method()
    module.policy = SecondSaveFails()
    with pytest.raises(OSError, match="No space"):
        toy_trainer(tmp_path, callbacks=[Export(str(tmp_path / "out"))]).fit(module, ToyData())
    assert [p.name for p in (tmp_path / "out").glob("iteration-*")] == ["iteration-1"]


def test_an_average_needs_its_callback(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs callbacks.ema.EMA"):
        toy_trainer(tmp_path, callbacks=[Export(str(tmp_path), weights="ema")]).fit(toy_method(), ToyData())


@pytest.mark.parametrize("wrong", [dict(every_n_epochs=0), dict(keep=0)])
def test_impossible_settings_are_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Export("out", **wrong)
