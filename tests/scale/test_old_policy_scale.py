"""DiffusionNFT and its old policy on two processes: the training of one process, and exact on resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import scenarios
from comparing import LORA, SHARDED, Alone, distance, ended, identical
from pair import Pair

pytestmark = pytest.mark.slow

TOLERANCE = 1e-6
TOY: dict[str, Any] = dict(old=dict(decay={"value": 0.3, "end": 0.3}))


def pairs(size: int, **nft: Any) -> dict[str, Any]:
    return dict(train_micro_batch=size, nft=dict(beta=0.5, **nft))


@pytest.mark.parametrize("strategy", ["ddp", *SHARDED, "zero3-offload"])
def test_two_processes_train_as_one_does(pair: Pair, alone: Alone, tmp_path: Path, strategy: str) -> None:
    """48 pairs: two updates of two micro-batches each, twice over, in epochs 1 and 2; the old policy answers from the second on."""
    single, one = alone(scenarios.fit, method_args=pairs(12), **TOY)
    two = pair.run("fit", folder=str(tmp_path / "two"), strategy=strategy, method_args=pairs(6), **TOY)
    assert [run["steps"] for run in two] == [one["steps"]] * 2 == [2 + 2 * 2 * 2] * 2
    a, b = ended(single), ended(tmp_path / "two")
    assert distance(a["weights"], b["weights"]) < TOLERANCE
    assert distance(a["old"], b["old"]) < TOLERANCE
    assert distance(a["old"], {name: a["weights"][name] for name in a["old"]}) > 0.01


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero2", "zero3, nothing kept"])
def test_adapters_train_as_in_one_process(pair: Pair, alone: Alone, tmp_path: Path, sd3_folder: Path, strategy: str) -> None:
    """A miniature SD3: LoRA with gradient checkpointing, a KL to the reference that the warm-up left."""
    settings: dict[str, Any] = dict(sd3=LORA | {"pretrained": str(sd3_folder)}, trainer_args=dict(max_epochs=2), **TOY)
    one, _ = alone(scenarios.fit, method_args=pairs(8), **settings)
    pair.run("fit", folder=str(tmp_path / "two"), strategy=strategy, method_args=pairs(4), **settings)
    a, b = ended(one), ended(tmp_path / "two")
    assert distance(a["weights"], b["weights"]) < TOLERANCE and distance(a["old"], b["old"]) < TOLERANCE
    assert a["old"].keys() == set(a["trained"])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero1", "zero3"])
def test_resume_equals_the_unbroken_run(pair: Pair, tmp_path: Path, strategy: str) -> None:
    """Inside an iteration, on its last minibatch."""
    settings: dict[str, Any] = dict(strategy=strategy, method_args=pairs(6) | dict(dropout=0.1), **TOY)
    pair.run("fit", folder=str(tmp_path / "unbroken"), save=dict(every_n_train_steps=2), **settings)
    for name in ("epoch=1-step=4", "epoch=1-step=6") if strategy == "ddp" else ("epoch=1-step=4",):
        pair.run("fit", folder=str(tmp_path / name), ckpt_path=str(tmp_path / "unbroken" / f"{name}.ckpt"), **settings)
        unbroken, continued = ended(tmp_path / "unbroken"), ended(tmp_path / name)
        assert identical(unbroken, continued) and distance(unbroken["old"], continued["old"]) == 0, name
