"""A run on two processes that stops and continues ends as the unbroken one, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from comparing import AT, LORA, SHARDED, Written, ended, identical
from pair import Pair

pytestmark = pytest.mark.slow

TOY: dict[str, Any] = dict(method_args=dict(advantage=dict(kind="history"), dropout=0.1, train_micro_batch=6))
PLACES = ("epoch=0-step=1", "epoch=0-step=2", "epoch=1-step=4", "epoch=1-step=6")


@pytest.fixture(scope="module")
def unbroken(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Written:
    """unbroken(strategy): folder of a run under it with a checkpoint of each step."""
    done: dict[str, Path] = {}

    def write(strategy: str) -> Path:
        if strategy not in done:
            done[strategy] = tmp_path_factory.mktemp(strategy)
            pair.run("fit", folder=str(done[strategy]), strategy=strategy, save=dict(every_n_train_steps=1), **TOY)
        return done[strategy]

    return write


@pytest.mark.parametrize("strategy", ["ddp", *SHARDED])
def test_resume_equals_the_unbroken_run(pair: Pair, unbroken: Written, tmp_path: Path, strategy: str) -> None:
    """2 steps of warm-up, then 4 in each iteration: inside the warm-up, at its end, inside an iteration, on its last minibatch."""
    for name in PLACES if strategy in ("ddp", "zero3") else PLACES[2:3]:  # the others differ from one of these in their files
        checkpoint = unbroken(strategy) / f"{name}.ckpt"
        pair.run("fit", folder=str(tmp_path / name), strategy=strategy, ckpt_path=str(checkpoint), **TOY)
        assert identical(ended(unbroken(strategy)), ended(tmp_path / name)), name


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero3"])
def test_resume_at_the_end_of_an_epoch(pair: Pair, unbroken: Written, tmp_path: Path, strategy: str) -> None:
    settings = TOY | dict(strategy=strategy)
    save = dict(every_n_epochs=1, save_on_train_epoch_end=True)
    pair.run("fit", folder=str(tmp_path / "begun"), save=save, trainer_args=dict(max_epochs=2), **settings)
    pair.run("fit", folder=str(tmp_path / "continued"), ckpt_path=str(tmp_path / "begun" / "epoch=1-step=6.ckpt"), **settings)
    assert identical(ended(unbroken(strategy)), ended(tmp_path / "continued"))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero2", "zero3"])
def test_resume_of_adapters_restores_the_frozen_one_too(
    pair: Pair, written: Written, tmp_path: Path, sd3_folder: Path, strategy: str
) -> None:
    """The reference adapter is frozen, but it is what the warm-up left: no pretrained folder has it."""
    settings: dict[str, Any] = dict(sd3=LORA | {"pretrained": str(sd3_folder)}, trainer_args=dict(max_epochs=2))
    settings |= dict(strategy=strategy, method_args=dict(train_micro_batch=4), ckpt_path=str(written(strategy) / AT))
    pair.run("fit", folder=str(tmp_path), **settings)
    assert identical(ended(written(strategy)), ended(tmp_path))
