"""DeepGen's parts on two processes: the training of one process, exact on resume, exports that its own tools read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import scenarios
import torch
from comparing import SPLIT_WEIGHTS, Alone, distance, ended, identical
from pair import Pair
from PIL import Image
from safetensors.torch import load_file

from lit_rl.checkpoints.rl_to_sft import main as rl_to_sft

pytestmark = pytest.mark.slow

TOLERANCE = 2e-5
"""Of float32 sums in another order, through attention whose logits are large."""
ALL = ["transformer", "bridge", "adapter"]
KINDS: dict[str, dict[str, Any]] = {
    "transformer": {"gradient_checkpointing": True},
    "bridge": {"train": ["bridge"], "gradient_checkpointing": True},
    "all": {"train": ALL, "learning_rates": {"bridge": 3e-3, "adapter": 1e-3}, "gradient_checkpointing": True},
    "all, LoRA": {"train": ALL, "lora": {"rank": 4, "alpha": 8.0, "init": "default"}},
}
FIRST = {"transformer": "network", "bridge": "conditioner.bridge", "adapter": "conditioner.language"}


SAVE = dict(every_n_train_steps=3)
"""Inside the first iteration, which is steps 3 and 4."""
INSIDE = "epoch=1-step=3.ckpt"


def settings(folder: Path, kind: str, epochs: int) -> dict[str, Any]:
    return dict(
        deepgen=KINDS[kind] | {"folder": str(folder), "keep_reference": True, "guidance_scale": 2.0},
        trainer_args=dict(max_epochs=epochs),
        export=True,
    )


def method(pairs: int) -> dict[str, Any]:
    return dict(train_micro_batch=pairs, seed=5)


@pytest.mark.parametrize(
    ("strategy", "kind", "continues"),
    [
        ("ddp", "bridge", False),
        ("fsdp2", "transformer", False),
        ("fsdp2", "all", True),
        ("zero2", "all, LoRA", True),
        ("zero3", "all", False),
    ],
)
def test_two_processes_train_as_one_does(
    pair: Pair, alone: Alone, tmp_path: Path, deepgen_folder: Path, strategy: str, kind: str, continues: bool
) -> None:
    """A warm-up of two updates, then an iteration; the exported weights are those.

    Some are continued inside the iteration: references of all parts, average and each part's moments come back.
    """
    more: dict[str, Any] = settings(deepgen_folder, kind, 2)
    one, _ = alone(scenarios.fit, method_args=method(8), **more)
    more |= dict(strategy=strategy, method_args=method(4))
    two = pair.run("fit", folder=str(tmp_path / "two"), save=SAVE if continues else None, **more)
    a, b = ended(one), ended(tmp_path / "two")
    for part in ("weights", "average"):
        assert distance(a[part], b[part]) < TOLERANCE, part
    assert [run["held"] < 0.55 for run in two] == [strategy in SPLIT_WEIGHTS] * 2
    parts = {name.split(".")[0] if name.startswith("network") else ".".join(name.split(".")[:2]) for name in a["trained"]}
    assert parts == ({FIRST[kind]} if kind in FIRST else set(FIRST.values()))
    files = [load_file(run / "export" / "iteration-1" / "model.safetensors") for run in (one, tmp_path / "two")]
    assert distance(*files) < TOLERANCE
    if continues:
        pair.run("fit", folder=str(tmp_path / "continued"), ckpt_path=str(tmp_path / "two" / INSIDE), **more)
        assert identical(b, ended(tmp_path / "continued"))


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_the_shards_of_two_processes_become_the_guides_file(pair: Pair, tmp_path: Path, deepgen_folder: Path, strategy: str) -> None:
    """By its command, from the folder that DeepSpeed writes: all that was trained, as the export of the same run has it."""
    more: dict[str, Any] = settings(deepgen_folder, "all", 1)
    pair.run("fit", folder=str(tmp_path), strategy=strategy, method_args=method(4), save=dict(every_n_train_steps=2), timeout=240, **more)
    (folder,) = tmp_path.glob("epoch=*-step=2.ckpt")
    assert folder.is_dir()
    rl_to_sft(["--rl_checkpoint", str(folder), "--output", str(tmp_path / "rl.pth"), "--quiet"])
    found, exported = torch.load(tmp_path / "rl.pth", weights_only=True), load_file(tmp_path / "export/iteration-0/model.safetensors")
    same = found.keys() & exported.keys()
    assert len(same) >= len(ended(tmp_path)["trained"])
    assert distance({name: found[name] for name in same}, {name: exported[name] for name in same}) == 0


@pytest.mark.parametrize(("strategy", "continues"), [("ddp", False), ("zero2", True)])
def test_two_processes_share_the_pictures_of_sft_aux(
    pair: Pair, alone: Alone, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, deepgen_folder: Path, strategy: str, continues: bool
) -> None:
    """Seven pictures of three shapes in each optimizer step, the policy's loss weighs 1 - c; continued in the middle of an iteration."""
    folder = tmp_path_factory.getbasetemp()
    for i, size in enumerate(((20, 12), (12, 20), (16, 16))):
        Image.radial_gradient("L").rotate(30 * i).resize(size).convert("RGB").save(folder / f"{i}.png")
    (folder / "pictures.json").write_text(json.dumps([{"image_path": f"{i}.png", "txt": f"picture {i}"} for i in range(3)]))
    aux = {"coef": 0.3, "convex": True, "batch_size": 7, "timesteps": "uniform", "shift": 3.0, "sources": str(folder / "pictures.json")}
    more: dict[str, Any] = dict(deepgen={"folder": str(deepgen_folder), "keep_reference": True}, trainer_args=dict(max_epochs=2))
    one, _ = alone(scenarios.fit, method_args=method(8) | {"aux": aux}, **more)
    more |= dict(strategy=strategy, method_args=method(4) | {"aux": aux})
    pair.run("fit", folder=str(tmp_path / "two"), save=dict(every_n_train_steps=2) if continues else None, **more)
    assert distance(ended(one)["weights"], ended(tmp_path / "two")["weights"]) < TOLERANCE
    if continues:
        pair.run("fit", folder=str(tmp_path / "continued"), ckpt_path=str(tmp_path / "two/epoch=0-step=2.ckpt"), **more)
        assert identical(ended(tmp_path / "two"), ended(tmp_path / "continued"))


def test_one_process_continues_as_the_unbroken_run(tmp_path: Path, deepgen_folder: Path) -> None:
    """The rest of the first iteration, and another."""
    more: dict[str, Any] = settings(deepgen_folder, "all, LoRA", 3) | dict(strategy="one", method_args=method(8))
    scenarios.fit(str(tmp_path / "unbroken"), save=SAVE, **more)
    scenarios.fit(str(tmp_path / "continued"), ckpt_path=str(tmp_path / "unbroken" / INSIDE), **more)
    assert identical(ended(tmp_path / "unbroken"), ended(tmp_path / "continued"))
