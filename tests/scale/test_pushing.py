"""Weights that are cut over processes come together on the first one alone, each in the dtype that is asked for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from pair import Pair
from pushing import Odd

DTYPES = {"tall": "bfloat16", "flat": "float16", "one": "float32", "list": "bfloat16", "even": "bfloat16"}


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    processes = Pair(tmp_path_factory.mktemp("three"), size=3)
    yield processes
    processes.stop()


@pytest.mark.parametrize("strategy", ["none", "fsdp2"])
def test_the_first_process_has_all_and_the_others_nothing(three: Pair, strategy: str) -> None:
    first, *others = three.run("pushing.on_first", strategy=strategy, dtypes=DTYPES)
    expected = {
        name: [f"torch.{DTYPES[name]}", "cpu", weight.detach().to(getattr(torch, DTYPES[name])).float().tolist()]
        for name, weight in Odd().named_parameters()
    }
    assert first["found"] == expected and [other["found"] for other in others] == [{}, {}]
    sent = [3] * len(DTYPES) if strategy == "fsdp2" else []
    assert first["received"] == sent and [other["received"] for other in others] == [[0] * len(sent)] * 2


def test_weights_that_are_not_asked_for_are_not_gathered(three: Pair) -> None:
    first, *_ = three.run("pushing.on_first", strategy="fsdp2", dtypes={"tall": "float32"})
    assert list(first["found"]) == ["tall"] and first["received"] == [3]


def test_copies_of_shards_are_gathered_as_well(three: Pair) -> None:
    """A mesh of two dimensions: copies of shards."""
    first, *others = three.run("pushing.on_first", strategy="fsdp2", dtypes=DTYPES, mesh=[1, 3])
    expected = {name: weight.detach().to(getattr(torch, DTYPES[name])).float().tolist() for name, weight in Odd().named_parameters()}
    assert {name: told[2] for name, told in first["found"].items()} == expected and [other["found"] for other in others] == [{}, {}]
