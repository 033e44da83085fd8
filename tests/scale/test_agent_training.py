"""Agents train on two processes as on one, although each has another number of turns."""

from __future__ import annotations

from pathlib import Path

import agent_runs
import pytest
import torch
from comparing import distance
from pair import Pair
from toy_text import model_folder

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(model_folder(tmp_path_factory.mktemp("agent") / "lm"))


@pytest.fixture(scope="module")
def alone(model: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, object], Path]:
    out = tmp_path_factory.mktemp("one")
    return agent_runs.fit(model, str(out), "one", parts=3), out / "end.pt"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero2"])
def test_two_processes_train_as_one_does(
    pair: Pair, tmp_path: Path, model: str, alone: tuple[dict[str, object], Path], strategy: str
) -> None:
    one, weights = alone
    two = pair.run("agent_runs.fit", model=model, out=str(tmp_path), strategy=strategy, parts=2)
    assert [run["steps"] for run in two] == [4, 4] == [one["steps"]] * 2
    assert two[0]["rows"] != two[1]["rows"] and two[0]["rows"] + two[1]["rows"] == one["rows"]
    for run in two:
        assert run["metrics"] == pytest.approx(one["metrics"], abs=1e-5)
    a, b = torch.load(weights), torch.load(tmp_path / "end.pt")
    assert a.keys() == b.keys() and distance(a, b) < 2e-6


def test_a_run_that_stops_twice_inside_iterations_ends_as_the_unbroken_one(pair: Pair, tmp_path: Path, model: str) -> None:
    def fit(name: str, start: str | None = None) -> dict[str, torch.Tensor]:
        ckpt_path = str(tmp_path / start) if start else None
        pair.run("agent_runs.fit", model=model, out=str(tmp_path / name), strategy="fsdp2", parts=2, save=True, ckpt_path=ckpt_path)
        return torch.load(tmp_path / name / "end.pt")

    unbroken, once, twice = fit("a"), fit("b", "a/epoch=0-step=1.ckpt"), fit("c", "b/epoch=1-step=3.ckpt")
    assert all(torch.equal(end[name], unbroken[name]) for end in (once, twice) for name in unbroken)
