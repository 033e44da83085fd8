"""However the weights are spread, a server gets all of them, and all processes go on or none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import scenarios
import toy_text
from pair import Pair, RemoteError
from rollouts.fake_server import FakeServer
from test_native_scale import answered_alone, by_group

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_text.model_folder(tmp_path_factory.mktemp("lm"), layers=2)


def settings(server: FakeServer, tmp_path: Path) -> dict[str, Any]:
    return {"urls": server.url, "sync_dir": str(tmp_path / "sync"), "probe_tolerance": 1e-4, "deadline_s": 20.0}


@pytest.mark.parametrize(("strategy", "lora"), [("ddp", True), ("fsdp2", True), ("fsdp2", False), ("zero2", False), ("zero3", False)])
def test_two_processes_are_answered_as_one_is(pair: Pair, folder: Path, tmp_path: Path, strategy: str, lora: bool) -> None:
    one = answered_alone(folder, lora)
    with FakeServer(folder) as server:
        two = pair.run("answers", folder=str(folder), strategy=strategy, lora=lora, http=settings(server, tmp_path))
        assert len(server.loads) == 2, "the first process pushes for both"
    for iteration in range(2):
        ranks = [rank[iteration] for rank in two]
        assert max(found["apart"] for found in ranks) < 1e-4
        assert by_group(ranks) == by_group([one[iteration]])


def test_answers_drawn_ahead_are_those_of_one_process(pair: Pair, folder: Path, tmp_path: Path) -> None:
    """The second iteration's are of the weights that drew the first one's: a run in turns draws others."""
    with FakeServer(folder) as server:
        given = {"folder": str(folder), "lora": True, "http": settings(server, tmp_path)}
        one = scenarios.answers(strategy="one", asynchronous=True, **given)
        two = pair.run("answers", strategy="ddp", asynchronous=True, **given)
        in_turns = scenarios.answers(strategy="one", **given)
    assert [by_group([rank[i] for rank in two]) for i in range(2)] == [by_group([one[i]]) for i in range(2)]
    assert by_group([one[0]]) == by_group([in_turns[0]]) and by_group([one[1]]) != by_group([in_turns[1]])


def test_a_push_that_fails_ends_all_processes_with_one_sentence(pair: Pair, folder: Path, tmp_path: Path) -> None:
    with FakeServer(folder) as server:
        server.refuses_loads = True
        with pytest.raises(RemoteError) as raised:
            pair.run("answers", folder=str(folder), strategy="ddp", lora=True, http=settings(server, tmp_path))
    first, second = raised.value.errors
    assert first == second and first.startswith("RolloutError: pushing weights failed: ")
