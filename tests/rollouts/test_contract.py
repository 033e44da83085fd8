"""The server of the tests does what vLLM does, as far as the engine over HTTP can tell; `test_vllm.py` asks vLLM itself the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_server import FakeServer
from rollouts import contract
from rollouts.contract import ADAPTERS, EVERY, LAST, WHOLE, Check, Served, hold
from toy_text import policy

from lit_rl.policies.weights.lora import LoraSettings
from lit_rl.rollouts.push import gather, write


def adapter(base: Path, folder: Path, rank: int) -> Path:
    """A new adapter of a miniature, as a push writes it."""
    made = policy(base, lora=LoraSettings(rank=rank, alpha=rank))
    made.load()
    write(made, gather(made), folder)
    return folder


@pytest.fixture(scope="module")
def served(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("adapters")
    running = FakeServer(base, token=contract.TOKEN, max_rank=contract.MAX_RANK)
    running.bases, running.max_model_len = ["first", "second"], contract.MOST
    with running:
        yield Served(running.url, adapter=adapter(base, folder / "narrow", 4), wide=adapter(base, folder / "wide", 16))


@pytest.mark.parametrize("check", [*EVERY, *ADAPTERS, *WHOLE, *LAST], ids=lambda check: check.__name__)
def test_the_server_of_the_tests_does_as_vllm(check: Check, served: Served) -> None:
    hold(check, served)
