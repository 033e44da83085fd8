"""DeepGen's parts on two processes: the training of one process, exact on resume, exports that its own tools read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import scenarios
from comparing import SPLIT_WEIGHTS, distance, ended, identical
from pair import Pair
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

TOLERANCE = 3e-6
ALL = ["transformer", "bridge", "adapter"]
KINDS: dict[str, dict[str, Any]] = {
    "transformer": {"gradient_checkpointing": True},
    "LoRA": {"lora": {"rank": 4, "alpha": 8.0, "init": "default"}},
    "bridge": {"train": ["bridge"], "gradient_checkpointing": True},
    "adapter": {"train": ["adapter"]},
    "all": {"train": ALL, "learning_rates": {"bridge": 3e-3, "adapter": 1e-3}, "gradient_checkpointing": True},
    "all, LoRA": {"train": ALL, "lora": {"rank": 4, "alpha": 8.0, "init": "default"}},
}
FIRST = {"transformer": "network", "LoRA": "network", "bridge": "conditioner.bridge", "adapter": "conditioner.language"}


def settings(folder: Path, kind: str) -> dict[str, Any]:
    return dict(
        deepgen=KINDS[kind] | {"folder": str(folder), "keep_reference": True, "guidance_scale": 2.0}, trainer_args=dict(max_epochs=3)
    )


def method(pairs: int) -> dict[str, Any]:
    return dict(num_steps=3, train_micro_batch=pairs, seed=5)


@pytest.mark.parametrize(
    ("strategy", "kind"),
    [
        ("ddp", "bridge"),
        ("ddp", "all, LoRA"),
        ("fsdp2", "transformer"),
        ("fsdp2", "all"),
        ("zero2", "adapter"),
        ("zero2", "all"),
        ("zero3", "LoRA"),
        ("zero3", "all"),
        ("zero3-offload", "all, LoRA"),
    ],
)
def test_two_processes_train_as_one_does(pair: Pair, tmp_path: Path, deepgen_folder: Path, strategy: str, kind: str) -> None:
    """A warm-up of two updates, then two iterations; the exported weights are those."""
    more = settings(deepgen_folder, kind) | dict(export=True)
    scenarios.fit(str(tmp_path / "one"), "one", method_args=method(8), **more)
    two = pair.run("fit", folder=str(tmp_path / "two"), strategy=strategy, method_args=method(4), **more)
    a, b = ended(tmp_path / "one"), ended(tmp_path / "two")
    for part in ("weights", "average"):
        assert distance(a[part], b[part]) < TOLERANCE, part
    assert [run["held"] < 0.55 for run in two] == [strategy in SPLIT_WEIGHTS] * 2
    parts = {name.split(".")[0] if name.startswith("network") else ".".join(name.split(".")[:2]) for name in a["trained"]}
    assert parts == ({FIRST[kind]} if kind in FIRST else set(FIRST.values()))
    files = [load_file(tmp_path / run / "export" / "iteration-2" / "model.safetensors") for run in ("one", "two")]
    assert distance(*files) < TOLERANCE


@pytest.mark.parametrize(
    ("strategy", "kind"), [("one", "all"), ("ddp", "all, LoRA"), ("fsdp2", "all"), ("zero2", "bridge"), ("zero3", "all")]
)
def test_resume_equals_the_unbroken_run(pair: Pair, tmp_path: Path, deepgen_folder: Path, strategy: str, kind: str) -> None:
    """Inside an iteration: the references of all parts, the average, and each part's moments come back."""
    more: dict[str, Any] = settings(deepgen_folder, kind) | dict(strategy=strategy, method_args=method(8 if strategy == "one" else 4))

    def fit(**where: Any) -> None:
        scenarios.fit(**where, **more) if strategy == "one" else pair.run("fit", **where, **more)

    fit(folder=str(tmp_path / "unbroken"), save=dict(every_n_train_steps=1))
    checkpoint = sorted((tmp_path / "unbroken").glob("epoch=1-step=*.ckpt"))[1]
    fit(folder=str(tmp_path / "continued"), ckpt_path=str(checkpoint))
    assert identical(ended(tmp_path / "unbroken"), ended(tmp_path / "continued"))
