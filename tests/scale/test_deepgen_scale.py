"""DeepGen's parts on two processes: the training of one process, exact on resume, exports that its own tools read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import scenarios
from comparing import SPLIT_WEIGHTS, Alone, distance, ended, identical
from pair import Pair
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

TOLERANCE = 2e-5
"""Of float32 sums in another order, through attention whose logits are large."""
ALL = ["transformer", "bridge", "adapter"]
KINDS: dict[str, dict[str, Any]] = {
    "transformer": {"gradient_checkpointing": True},
    "bridge": {"train": ["bridge"], "gradient_checkpointing": True},
    "adapter": {"train": ["adapter"]},
    "all": {"train": ALL, "learning_rates": {"bridge": 3e-3, "adapter": 1e-3}, "gradient_checkpointing": True},
    "all, LoRA": {"train": ALL, "lora": {"rank": 4, "alpha": 8.0, "init": "default"}},
}
FIRST = {"transformer": "network", "bridge": "conditioner.bridge", "adapter": "conditioner.language"}


SAVE = dict(every_n_train_steps=4)
"""Inside the first iteration, which is steps 3 to 6."""
INSIDE = "epoch=1-step=4.ckpt"


def settings(folder: Path, kind: str, epochs: int) -> dict[str, Any]:
    return dict(
        deepgen=KINDS[kind] | {"folder": str(folder), "keep_reference": True, "guidance_scale": 2.0},
        trainer_args=dict(max_epochs=epochs),
        export=True,
    )


def method(pairs: int) -> dict[str, Any]:
    return dict(num_steps=3, train_micro_batch=pairs, seed=5)


@pytest.mark.parametrize(
    ("strategy", "kind", "continues"),
    [
        ("ddp", "bridge", False),
        ("fsdp2", "transformer", False),
        ("fsdp2", "all", True),
        ("zero2", "adapter", False),
        ("zero3", "all", True),
        ("zero3-offload", "all, LoRA", False),
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


def test_one_process_continues_as_the_unbroken_run(tmp_path: Path, deepgen_folder: Path) -> None:
    """The rest of the first iteration, and another."""
    more: dict[str, Any] = settings(deepgen_folder, "all, LoRA", 3) | dict(strategy="one", method_args=method(8))
    scenarios.fit(str(tmp_path / "unbroken"), save=SAVE, **more)
    scenarios.fit(str(tmp_path / "continued"), ckpt_path=str(tmp_path / "unbroken" / INSIDE), **more)
    assert identical(ended(tmp_path / "unbroken"), ended(tmp_path / "continued"))
