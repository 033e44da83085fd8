"""However the work is spread, the training is the one of a single process on the same global batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import scenarios
import torch
from comparing import FULL, LORA, SHARDED, SPLIT_WEIGHTS, Alone, distance, ended
from pair import Pair

pytestmark = pytest.mark.slow

TOLERANCE = 1e-6
"""The largest difference of weights, which move by 0.01 in a step. Measured: 6e-8 for the toy, 2e-7 for the miniature SD3."""

METHODS: dict[str, dict[str, Any]] = {
    "std of the batch": dict(),
    "gdpo": dict(advantage=dict(kind="gdpo"), kl_kind="v"),
    "history": dict(advantage=dict(kind="history"), storage_dtype="bfloat16"),
    "groups, zeros dropped": dict(advantage=dict(std="group", drop_zero=True), kl_coef=0.0, same_latent=True),
}


@pytest.mark.parametrize(
    ("strategy", "name"), [*(("ddp", name) for name in METHODS), *((sharded, "history") for sharded in [*SHARDED, "zero3-offload"])]
)
def test_two_processes_train_as_one_does(pair: Pair, alone: Alone, tmp_path: Path, strategy: str, name: str) -> None:
    """48 pairs: two updates of two micro-batches each, twice over, in epochs 1 and 2; epoch 0 is the warm-up of two updates."""
    single, one = alone(scenarios.fit, method_args=METHODS[name] | dict(train_micro_batch=12))
    two = pair.run("fit", folder=str(tmp_path / "two"), strategy=strategy, method_args=METHODS[name] | dict(train_micro_batch=6))
    assert [run["steps"] for run in two] == [one["steps"]] * 2 == [2 + 2 * 2 * 2] * 2
    assert [run["held"] for run in two] == [0.5 if strategy in SPLIT_WEIGHTS else 1] * 2
    a, b = ended(single), ended(tmp_path / "two")
    assert distance(a["weights"], b["weights"]) < TOLERANCE
    assert distance(a["average"], b["average"]) < TOLERANCE
    assert b["validated"] == pytest.approx(a["validated"], abs=1e-6)
    assert b["tracker"].keys() == a["tracker"].keys()
    untrained = scenarios.method({}, None).policy
    untrained.load()
    assert distance(a["weights"], dict(untrained.named_parameters())) > 0.01


@pytest.mark.parametrize(("strategy", "kind"), [("ddp", "lora"), ("fsdp2", "lora"), ("fsdp2", "full"), ("zero3", "full")])
def test_sd3_trains_as_in_one_process(pair: Pair, alone: Alone, tmp_path: Path, sd3_folder: Path, strategy: str, kind: str) -> None:
    """With gradient checkpointing, a KL to the reference that the warm-up left, and an export at the end."""
    # Of the seed: with some, a pixel lies so near to the middle of two of its 256 values that the last bits decide.
    method: dict[str, Any] = dict(seed=2)
    sd3 = (LORA if kind == "lora" else FULL) | {"pretrained": str(sd3_folder)}
    settings: dict[str, Any] = dict(sd3=sd3, trainer_args=dict(max_epochs=2), export=True)
    one, _ = alone(scenarios.fit, method_args=method | dict(train_micro_batch=8), **settings)
    two = pair.run("fit", folder=str(tmp_path / "two"), strategy=strategy, method_args=method | dict(train_micro_batch=4), **settings)
    a, b = ended(one), ended(tmp_path / "two")
    assert distance(a["weights"], b["weights"]) < TOLERANCE
    assert [run["held"] < 0.55 for run in two] == [strategy in SPLIT_WEIGHTS] * 2
    reference = {n: w for n, w in b["weights"].items() if "reference" in n}
    live = {n.replace(".reference.", ".default.").replace("reference_network", "network"): w for n, w in reference.items()}
    assert 1e-4 < distance(live, {n: b["weights"][n] for n in live}) < 0.2  # as after the warm-up, not as before, not as now
    exported = [weights_in(run / "export" / "iteration-1", kind) for run in (one, tmp_path / "two")]
    assert distance(exported[0], exported[1]) < TOLERANCE


def weights_in(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    """The network's weights in an exported folder."""
    from safetensors.torch import load_file

    name = "pytorch_lora_weights.safetensors" if kind == "lora" else "transformer/diffusion_pytorch_model.safetensors"
    return load_file(folder / name)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2-bf16", "zero2", "zero3"])
def test_bf16_mixed_stays_near_float32(pair: Pair, alone: Alone, tmp_path: Path, sd3_folder: Path, strategy: str) -> None:
    """Four steps of at most 0.01 each; bfloat16 has 8 bits."""
    settings: dict[str, Any] = dict(sd3=LORA | {"pretrained": str(sd3_folder)})
    full, mixed = dict(max_epochs=2), dict(max_epochs=2, precision="bf16-mixed")
    one, _ = alone(scenarios.fit, method_args=dict(train_micro_batch=8), trainer_args=full, **settings)
    arguments: dict[str, Any] = dict(strategy=strategy, method_args=dict(train_micro_batch=4), trainer_args=mixed)
    pair.run("fit", folder=str(tmp_path / "two"), **arguments, **settings)
    assert 0 < distance(ended(one)["weights"], ended(tmp_path / "two")["weights"]) < 2e-3
