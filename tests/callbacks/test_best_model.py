"""The best evaluation's weights stand in one folder; the first of equals stays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from toy import ToyData, toy_method, toy_trainer

from callbacks.best_model import BestModel
from callbacks.ema import EMA
from lit_rl.errors import ConfigError

BRIGHT = "val/brightness"


@pytest.mark.parametrize(("mode", "written"), [("max", [0.1, 0.3, 0.5]), ("min", [0.1, 0.0])])
def test_only_what_is_strictly_better_is_written(mode: str, written: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[float] = []
    trainer = SimpleNamespace(state=SimpleNamespace(fn="fit"), sanity_checking=False, callback_metrics={})
    monkeypatch.setattr(BestModel, "write", lambda self, trainer, module, target: found.append(self.best))
    callback = BestModel(mode=mode)
    for value in (0.1, 0.3, 0.3, math.nan, 0.2, 0.5, 0.0):
        trainer.callback_metrics = {"val/accuracy": torch.tensor(value)}
        callback.on_validation_end(trainer, None)
        again = BestModel(mode=mode)  # a run that is continued
        again.load_state_dict(callback.state_dict())
        callback = again
    assert found == pytest.approx(written)


def test_a_number_that_the_evaluation_does_not_have_is_told() -> None:
    trainer = SimpleNamespace(state=SimpleNamespace(fn="fit"), sanity_checking=False, callback_metrics={"val/reward": torch.tensor(1.0)})
    with pytest.raises(ConfigError, match="BestModel monitor=val/accuracy: the evaluation has no such number; it has val/reward"):
        BestModel().on_validation_end(trainer, None)
    trainer.state.fn = "validate"
    BestModel(str(Path("x"))).on_validation_end(trainer, None)


def run(folder: Path, callbacks: Sequence[L.Callback], **settings: int) -> L.LightningModule:
    """A run of two iterations, each with an evaluation."""
    module = toy_method()
    toy_trainer(folder, callbacks=callbacks, limit_val_batches=1, **settings).fit(module, ToyData())
    return module


@pytest.mark.parametrize("first", [True, False])
def test_live_and_averaged_weights_are_what_they_say_whether_an_average_is_evaluated_or_not(tmp_path: Path, first: bool) -> None:
    """An average takes the weights' place in an evaluation, at the end of which callbacks have their turn in the trainer's order."""
    best = [BestModel(str(tmp_path / held), monitor=BRIGHT, weights=held) for held in ("live", "ema")]
    average = EMA(decay=0.9)
    module = run(tmp_path, [*best, average] if first else [average, *best], max_epochs=1)
    live, averaged = (torch.load(tmp_path / held / "weights.pt", weights_only=True) for held in ("live", "ema"))
    held = dict(module.policy.trainable())
    assert live.keys() == held.keys() and all(torch.equal(live[name], weight) for name, weight in held.items())
    assert not all(torch.equal(averaged[name], weight) for name, weight in held.items())


def test_a_run_can_keep_several_bests_each_with_its_own_number(tmp_path: Path) -> None:
    def both() -> list[BestModel]:
        return [BestModel(str(tmp_path / mode), monitor=BRIGHT, mode=mode) for mode in ("max", "min")]

    run(tmp_path, before := both(), enable_checkpointing=True)
    continued = both()
    trainer = toy_trainer(tmp_path, callbacks=continued, limit_val_batches=1)
    trainer.fit(toy_method(), ToyData(), ckpt_path=str(next((tmp_path / "checkpoints").glob("*.ckpt"))))
    assert [one.best for one in continued] == [one.best for one in before] and before[0].best != before[1].best


def test_a_folder_has_one_writer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"BestModel and BestModel write .*best: give one of them another dirpath"):
        run(tmp_path, [BestModel(str(tmp_path / "best"), monitor=BRIGHT, mode=mode) for mode in ("max", "min")])
