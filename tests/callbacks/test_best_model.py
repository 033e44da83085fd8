"""The best evaluation's weights stand in one folder; the first of equals stays."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from callbacks.best_model import BestModel
from lit_rl.errors import ConfigError


@pytest.mark.parametrize(("mode", "written"), [("max", [0.1, 0.3, 0.5]), ("min", [0.1, 0.0])])
def test_only_what_is_strictly_better_is_written(mode: str, written: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[float] = []
    trainer = SimpleNamespace(state=SimpleNamespace(fn="fit"), sanity_checking=False, callback_metrics={})
    monkeypatch.setattr(BestModel, "put", lambda self, trainer, module, target: found.append(self.best))
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
