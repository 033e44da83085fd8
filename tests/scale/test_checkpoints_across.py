"""Checkpoints across strategies: their contents, the runs that can continue from them, and the errors of those that cannot."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import scenarios
import torch
from comparing import AT, FULL, LORA, SHARDED, Written, distance, ended
from pair import Pair

from lit_rl.checkpoints.files import what_is_missing
from lit_rl.checkpoints.manifest import entries, write_manifest
from lit_rl.checkpoints.restricted import stored_shapes
from lit_rl.surgery.inputs import Adapter, open_input

pytestmark = pytest.mark.slow

KINDS = ["ddp", "fsdp2", "zero3"]
"""A strategy for each way in which weights and moments are stored: a file, torch's shards, DeepSpeed's."""
METHOD = dict(train_micro_batch=4)


def stored(checkpoint: Path) -> dict[str, list[int]]:
    """Shape by name of the weights in a checkpoint, whoever wrote it."""
    if checkpoint.is_file():
        file = torch.load(checkpoint, weights_only=True)
        return {name: list(weight.shape) for name, weight in file["state_dict"].items()}
    if (checkpoint / "weights.json").exists():
        return json.loads((checkpoint / "weights.json").read_text())
    return stored_shapes(checkpoint)


@pytest.mark.parametrize("strategy", ["ddp", *SHARDED])
def test_checkpoint_of_a_lora_run_holds_the_adapters_alone(written: Written, strategy: str) -> None:
    folder = written(strategy)
    weights = {f"policy.{name}": list(weight.shape) for name, weight in ended(folder)["weights"].items() if ".lora_" in name}
    assert stored(folder / AT) == weights and any(".reference." in name for name in weights)
    assert what_is_missing(folder / AT) is None
    assert not list(folder.glob(".*"))  # nothing half-written is left


@pytest.mark.parametrize("strategy", SHARDED)
def test_the_adapter_in_a_checkpoint_is_read_tensor_by_tensor(written: Written, strategy: str) -> None:
    """Merges read the same adapter of any strategy's files, with its strength and without its reference."""
    found, plain = (open_input(written(name) / AT) for name in (strategy, "ddp"))
    assert isinstance(found, Adapter) and isinstance(plain, Adapter)
    assert found.scales == plain.scales and set(found.scales.values()) == {2.0} and found.kind == "pipeline"
    assert found.tensors.facts == plain.tensors.facts
    tensors = [{name: adapter.tensors.number(name) for name in plain.tensors.facts} for adapter in (found, plain)]
    assert distance(*tensors) < 1e-5


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_deepspeed_writes_no_base_weights(written: Written, strategy: str) -> None:
    """DeepSpeed has several places for weights; in none of its files is a name of the frozen base network."""
    texts = []
    for file in (written(strategy) / AT / "checkpoint").glob("*.pt"):
        with zipfile.ZipFile(file) as archive:
            texts += [archive.read(name) for name in archive.namelist() if name.endswith("data.pkl")]
    assert any(b"to_q.lora_A.default.weight" in text for text in texts)
    assert any(b"to_q.lora_A.reference.weight" in text for text in texts)
    assert not any(b"pos_embed.proj.weight" in text or b"to_q.base_layer.weight" in text for text in texts)


@pytest.mark.parametrize(
    ("source", "target"), [("ddp", "fsdp2-file"), ("ddp", "fsdp2"), ("fsdp2-file", "ddp"), ("fsdp2", "fsdp2-file"), ("zero2", "zero2")]
)
def test_training_goes_on_under_another_strategy(
    pair: Pair, written: Written, tmp_path: Path, sd3_folder: Path, source: str, target: str
) -> None:
    """Optimizer, average and rollout included. Shards need the strategy that wrote them, files do not."""
    settings = dict(method_args=METHOD, sd3=LORA | {"pretrained": str(sd3_folder)}, trainer_args=dict(max_epochs=2))
    pair.run("fit", folder=str(tmp_path), strategy=target, ckpt_path=str(written(source) / AT), **settings)
    for kind in ("weights", "average"):
        assert distance(ended(written(source))[kind], ended(tmp_path)[kind]) < 1e-6


def test_training_goes_on_in_one_process(written: Written, tmp_path: Path, sd3_folder: Path) -> None:
    """From the end of the warm-up: an iteration in progress belongs to its processes."""
    settings: dict[str, Any] = dict(sd3=LORA | {"pretrained": str(sd3_folder)}, trainer_args=dict(max_epochs=2))
    checkpoint = str(written("fsdp2-file") / "epoch=0-step=2.ckpt")
    scenarios.fit(str(tmp_path), "one", method_args=dict(train_micro_batch=8), ckpt_path=checkpoint, **settings)
    assert distance(ended(written("fsdp2-file"))["weights"], ended(tmp_path)["weights"]) < 1e-6


@pytest.mark.parametrize("strategy", KINDS)
def test_weights_of_another_model_are_refused(pair: Pair, written: Written, tmp_path: Path, sd3_folder: Path, strategy: str) -> None:
    settings = dict(folder=str(tmp_path), strategy=strategy, method_args=METHOD, ckpt_path=str(written(strategy) / AT))
    rank8 = LORA | {"pretrained": str(sd3_folder), "lora": LORA["lora"] | {"rank": 8}}
    for message in pair.run("fails", sd3=rank8, **settings):
        assert "lora_A.default.weight is [4, 32] there and [8, 32] here" in message and "lora.rank" in message
    alpha1 = LORA | {"pretrained": str(sd3_folder), "lora": LORA["lora"] | {"alpha": 1.0}}
    for message in pair.run("fails", sd3=alpha1, **settings):
        assert "lora.alpha: the checkpoint's adapter was trained with" in message and "this run has 1, another strength" in message
    fewer = LORA | {"pretrained": str(sd3_folder), "lora": LORA["lora"] | {"targets": ["attn.to_q"]}}
    for message in pair.run("fails", sd3=fewer, **settings):
        assert "weights of adapters or of a reference that this run would drop" in message and "lora.targets" in message
    for message in pair.run("fails", sd3=FULL | {"pretrained": str(sd3_folder)}, **settings):
        assert "lacks" in message and "policy.network.pos_embed.proj.weight" in message


@pytest.mark.parametrize("strategy", KINDS)
def test_moments_of_another_optimizer_are_refused(pair: Pair, written: Written, tmp_path: Path, sd3_folder: Path, strategy: str) -> None:
    settings = dict(method_args=METHOD | {"optimizer": "Adagrad"}, sd3=LORA | {"pretrained": str(sd3_folder)})
    for message in pair.run("fails", folder=str(tmp_path), strategy=strategy, ckpt_path=str(written(strategy) / AT), **settings):
        assert "the checkpoint holds the state of AdamW, and model.optimizer is Adagrad" in message


def test_a_file_is_no_deepspeed_checkpoint(pair: Pair, written: Written, tmp_path: Path, sd3_folder: Path) -> None:
    settings = dict(folder=str(tmp_path), method_args=METHOD, sd3=LORA | {"pretrained": str(sd3_folder)})
    for message in pair.run("fails", strategy="zero2", ckpt_path=str(written("ddp") / AT), **settings):
        assert "is a single file" in message
    for message in pair.run("fails", strategy="fsdp2", ckpt_path=str(written("zero2") / AT), **settings):
        assert "DeepSpeed" in message


@pytest.mark.parametrize("strategy", ["fsdp2", "zero2", "zero3"])
def test_what_is_stored_cannot_be_made_to_execute(pair: Pair, written: Written, tmp_path: Path, sd3_folder: Path, strategy: str) -> None:
    """A function named by any of the files that a process reads, in turn: refused by its name before it is called."""
    settings = dict(method_args=METHOD, sd3=LORA | {"pretrained": str(sd3_folder)}, trainer_args=dict(max_epochs=2))
    kinds = (".metadata", "meta.pt") if strategy == "fsdp2" else ("checkpoint/*model_states.pt", "checkpoint/*optim_states.pt")
    for kind in kinds:
        evil = tmp_path / kind.replace("*", "").replace("/", "-")
        shutil.copytree(written(strategy) / AT, evil)
        for file in evil.glob(kind):
            poison(file, tmp_path / "executed")
        write_manifest(evil, [entries(evil, 0, 1)])  # who means harm can write that too
        errors = pair.run("fails", folder=str(tmp_path / "out"), strategy=strategy, ckpt_path=str(evil), **settings)
        assert all("names posix.mkdir, which would be executed" in error for error in errors), errors
        assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("strategy", ["fsdp2", "zero2", "zero3"])
def test_damage_that_one_process_finds_stops_all(pair: Pair, written: Written, tmp_path: Path, sd3_folder: Path, strategy: str) -> None:
    """They say the same at once; none waits for the others."""
    settings = dict(method_args=METHOD, sd3=LORA | {"pretrained": str(sd3_folder)}, trainer_args=dict(max_epochs=2))
    torn = Path(shutil.copytree(written(strategy) / AT, tmp_path / "torn.ckpt"))
    good = shutil.copytree(written(strategy) / AT, tmp_path / "good.ckpt")
    shard = sorted([*torn.glob("*.distcp"), *torn.glob("checkpoint/*optim_states.pt")])[-1]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    shard.write_bytes(content)
    first, second = pair.run("fails", folder=str(tmp_path / "out"), strategy=strategy, ckpt_path=str(torn), timeout=240, **settings)
    assert first == second and f"{shard.name} has another content" in first and first.endswith(f"use --ckpt_path {good}")


def poison(file: Path, mark: Path) -> None:
    """Put a function's name into what the file holds, or in its place."""
    if file.suffix == ".pt":
        content = torch.load(file, weights_only=False)
        torch.save({**content, "bomb": Bomb(mark)}, file)
    else:
        file.write_bytes(pickle.dumps(Bomb(mark)))


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)
