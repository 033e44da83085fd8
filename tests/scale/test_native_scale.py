"""However the weights are spread, each process answers as a single one does, and as its trainer computes."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import scenarios
import toy_text
from pair import Pair

pytestmark = pytest.mark.slow


def by_group(iteration: list[dict[str, Any]]) -> dict[int, list[list[int]]]:
    """Answers with their prompts, of all processes."""
    found: dict[int, list[list[int]]] = {}
    for rank in iteration:
        for group, ids in zip(rank["group"], rank["ids"]):
            found.setdefault(group, []).append(ids)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_text.model_folder(tmp_path_factory.mktemp("lm"), layers=2)


@cache
def answered_alone(folder: Path, lora: bool) -> list[dict[str, Any]]:
    """The answers of a single process."""
    return scenarios.answers(str(folder), "one", lora=lora)


@pytest.mark.parametrize(
    ("strategy", "lora"), [("ddp", False), ("fsdp2", False), ("fsdp2", True), ("zero2", True), ("zero3", False), ("zero3", True)]
)
def test_two_processes_answer_as_one_does(pair: Pair, folder: Path, strategy: str, lora: bool) -> None:
    """Before and after an optimizer step; answers of different lengths, so that no process may wait for the other between two tokens."""
    one = answered_alone(folder, lora)
    two = pair.run("answers", folder=str(folder), strategy=strategy, lora=lora)
    for iteration in range(2):
        ranks = [rank[iteration] for rank in two]
        assert max(found["apart"] for found in (*ranks, one[iteration])) < 1e-4
        assert by_group(ranks) == by_group([one[iteration]])
    assert by_group([one[0]]) != by_group([one[1]])


def test_shards_are_gathered_in_the_precision_they_are_computed_with(pair: Pair, folder: Path) -> None:
    for found in pair.run("answers", folder=str(folder), strategy="fsdp2", lora=False, precision="bf16-mixed"):
        assert max(iteration["mean"] for iteration in found) < 0.02


@pytest.fixture
def unknown(folder: Path, tmp_path: Path) -> Path:
    """A model with another activation, which the engine leaves to `HFEngine`."""
    copy = shutil.copytree(folder, tmp_path / "lm")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    return copy


@pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])
def test_generate_of_transformers_waits_for_the_other_process(pair: Pair, unknown: Path, strategy: str) -> None:
    one = scenarios.answers(str(unknown), "one", lora=False)
    two = pair.run("answers", folder=str(unknown), strategy=strategy, lora=False)
    assert [by_group([rank[i] for rank in two]) for i in (0, 1)] == [by_group([iteration]) for iteration in one]


@pytest.mark.parametrize(("strategy", "more"), [("zero3", (9, 2)), ("zero3", (0, 7)), ("fsdp2", (0, 7))])
def test_generate_of_transformers_answers_whoever_asks(pair: Pair, unknown: Path, strategy: str, more: tuple[int, int]) -> None:
    """Two batches of at most 6 on one process, one or none on the other, which must not wait for more forwards than there are."""
    one = scenarios.answers(str(unknown), "one", lora=False, more=more)
    two = pair.run("answers", folder=str(unknown), strategy=strategy, lora=False, more=more, timeout=240)
    for iteration in range(2):
        assert [len(rank[iteration]["more"]) for rank in two] == list(more)
        assert [ids for rank in two for ids in rank[iteration]["more"]] == one[iteration]["more"]
        assert by_group([rank[iteration] for rank in two]) == by_group([one[iteration]])


@pytest.mark.parametrize("held_out", ["sppp", "ppp"])
def test_self_play_on_one_process_alone_and_held_out_pairs_under_zero3(pair: Pair, unknown: Path, tmp_path: Path, held_out: str) -> None:
    """The second process has pairs only to train on, and in evaluation a batch that is filled up; an update of both kinds as of one."""
    kinds = {"s": {"prompt": "21=", "self_play": True}, "p": {"prompt": "31=", "chosen": "13", "rejected": "31"}}
    files = {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "val")}
    for file, rows in zip(files.values(), ("sppp", held_out)):
        Path(file).write_text("".join(json.dumps(kinds[kind]) + "\n" for kind in rows))
    one = scenarios.mixed(str(unknown), "one", **files)
    assert one["val/dpo_accuracy"] == 1 and one["val/dpo_margin"] > 0.01 and ("val/long" in one) == ("s" in held_out)
    for rank in pair.run("mixed", folder=str(unknown), strategy="zero3", timeout=240, **files):
        assert rank == pytest.approx(one, abs=1e-4)
