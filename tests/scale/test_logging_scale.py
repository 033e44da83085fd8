"""Logged values are the same on any number of processes, and reading them on one process is safe."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import logged_runs
import pytest
import torch
import toy_text
from pair import Pair

pytestmark = pytest.mark.slow


def alike(one: dict[str, Any], many: list[dict[str, Any]]) -> None:
    """Every number but times; the weights of every process."""
    rows, theirs = one["rows"], many[0]["rows"]
    assert len(rows) == len(theirs) == 3 and all(run["steps"] == one["steps"] for run in many)
    for mine, other in zip(rows, theirs):
        assert mine.keys() == other.keys()
        for name, value in mine.items():
            if not name.startswith(("time/", "throughput/")) and not name.endswith("seconds"):
                assert math.isclose(value, other[name], rel_tol=1e-4, abs_tol=1e-5), (name, value, other[name])
    for run in many:
        torch.testing.assert_close(torch.tensor(run["weights"]), torch.tensor(one["weights"]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("bar", logged_runs.BARS)
def test_any_bar_shows_what_one_process_shows(pair: Pair, tmp_path: Path, bar: str) -> None:
    """Bars, callbacks and monitors read on the first process alone; other micro-batches, and steps that a process has no pair of."""
    one = logged_runs.fit(str(tmp_path / "one"), bar=bar)
    alike(one, pair.run("logged_runs.fit", folder=str(tmp_path / "two"), bar=bar, size=3))
    assert {"loss", "kl_divergence", "grad_norm", "reward_mean", "ratio_max_dev", "throughput/pairs_per_s"} <= one["rows"][-1].keys()


@pytest.mark.parametrize("kind", ["flow", "nft"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_three_processes_train_and_log_as_one_does(three: Pair, tmp_path: Path, kind: str, strategy: str) -> None:
    one = logged_runs.fit(str(tmp_path / "one"), kind=kind, size=5)
    alike(one, three.run("logged_runs.fit", folder=str(tmp_path / "three"), kind=kind, strategy=strategy, size=2))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_language_models_log_as_one_process_does(pair: Pair, tmp_path: Path, strategy: str) -> None:
    model = toy_text.model_folder(tmp_path / "model")
    one = logged_runs.fit(str(tmp_path / "one"), kind="grpo", model=str(model))
    for parts in (1, 4):
        settings: dict[str, Any] = dict(kind="grpo", model=str(model), parts=parts, strategy=strategy)
        alike(one, pair.run("logged_runs.fit", folder=str(tmp_path / f"two{parts}"), **settings))
