"""A checkpoint that was changed after it was written: told before training goes on from a part of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import ToyData, toy_method, toy_trainer

from lit_rl.errors import ConfigError


def other_shape(checkpoint: dict[str, Any]) -> None:
    checkpoint["optimizer_states"][0]["state"][1]["exp_avg"] = torch.zeros(7)


def no_optimizer(checkpoint: dict[str, Any]) -> None:
    checkpoint["optimizer_states"] = []


def no_moments(checkpoint: dict[str, Any]) -> None:
    del checkpoint["optimizer_states"][0]["state"]


def no_callbacks(checkpoint: dict[str, Any]) -> None:
    del checkpoint["callbacks"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_shape, r"holds exp_avg of shape \[7\] for weight 1, which has"),
        (no_moments, "optimizer_states have no moments under `state`: it was changed after it was written, use another"),
        (no_optimizer, "holds no state of an optimizer"),
        (no_callbacks, "lacks the states of callbacks"),
    ],
)
def test_training_does_not_go_on_from_a_part(tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    trainer = toy_trainer(tmp_path, max_epochs=1)
    trainer.fit(toy_method(), ToyData())
    trainer.save_checkpoint(tmp_path / "whole.ckpt")
    checkpoint = torch.load(tmp_path / "whole.ckpt", weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, tmp_path / "changed.ckpt")
    with pytest.raises(ConfigError, match=message):
        toy_trainer(tmp_path, max_epochs=2).fit(toy_method(), ToyData(), ckpt_path=str(tmp_path / "changed.ckpt"))
