"""All requests of a rollout are under way at once, whichever chunk they are of."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_server import FakeServer
from lightning import Callback
from rewards.fault_proxy import Fault
from test_http import LORA, SHORT, assert_same, in_process, loaded, pushed, requests, run

from lit_rl.rollouts.base import Request, RolloutError
from lit_rl.rollouts.hf import HFEngine


def chunks(policy: Any) -> list[list[Request]]:
    """Three siblings of each of three prompts, a chunk for each prompt, and one that is empty."""
    asked = requests(policy)
    return [asked[:3], [], asked[3:6], asked[6:]]


def test_a_slow_answer_in_one_chunk_holds_no_other(base: Path, server: FakeServer, tmp_path: Path) -> None:
    """The first chunk is there last, and by then everything is: the second and the third waited for nothing."""
    policy = loaded(base, LORA)
    made = pushed(server, tmp_path, policy)
    server.slow = {tuple(policy.encode("12=")): 0.8, tuple(policy.encode("0451=")): 0.8}
    seen, found = [], []
    for answers in made.stream(chunks(policy), SHORT):
        seen.append((len(server.asked), server.answered))
        found.append(answers)
    assert seen[0][0] == 9 and seen[0][1] >= 6, "all were asked for, and the second chunk was answered, before the first was there"
    assert [len(answers) for answers in found] == [3, 0, 3, 3]
    assert_same([answer for answers in found for answer in answers], in_process(policy, requests(policy)))


def test_a_chunk_is_there_before_a_later_one_is_done(base: Path, server: FakeServer, tmp_path: Path) -> None:
    policy = loaded(base, LORA)
    made = pushed(server, tmp_path, policy)
    server.slow = {tuple(policy.encode("0451=")): 0.6}
    seen = [server.answered for _ in made.stream(chunks(policy), SHORT)]
    assert max(seen[:3]) <= 6 and seen[3] == 9


@pytest.mark.parametrize("concurrency", [1, 4])
def test_no_more_requests_than_asked_for_are_under_way(concurrency: int, base: Path, server: FakeServer, tmp_path: Path) -> None:
    policy = loaded(base, LORA)
    made = pushed(server, tmp_path, policy, concurrency=concurrency)
    server.slow = {tuple(request.prompt): 0.05 for request in requests(policy)}
    assert [len(answers) for answers in made.stream(chunks(policy), SHORT)] == [3, 0, 3, 3]
    assert server.most_at_once == concurrency


def test_what_is_under_way_ends_with_the_loop_that_asked_for_it(base: Path, server: FakeServer, tmp_path: Path) -> None:
    policy = loaded(base, LORA)
    made = pushed(server, tmp_path, policy, concurrency=1)
    server.slow = {tuple(request.prompt): 0.1 for request in requests(policy)}
    answers = made.stream(chunks(policy), SHORT)
    next(answers)
    answers.close()
    time.sleep(0.2)  # what was sent just before it arrives
    asked = len(server.asked)
    time.sleep(0.3)
    assert len(server.asked) == asked < 9


def test_an_error_in_a_later_chunk_ends_the_wait_for_an_earlier_one(base: Path, server: FakeServer, tmp_path: Path) -> None:
    policy = loaded(base, LORA)
    made = pushed(server, tmp_path, policy)
    server.faults = iter([Fault("hang")] * 3 + [Fault("status", 400)] * 9)
    began = time.monotonic()
    with pytest.raises(RolloutError, match="status 400"):
        list(made.stream(chunks(policy), SHORT))
    assert time.monotonic() - began < 3


@pytest.mark.parametrize(("dialect", "lora"), [("openai", LORA), ("openai", None), ("vllm", None)], ids=["lora", "full", "vllm"])
def test_a_restart_asks_anew_for_the_chunks_that_are_not_there_yet(
    dialect: str, lora: Any, base: Path, server: FakeServer, tmp_path: Path
) -> None:
    policy = loaded(base, lora, shift=0.05)
    made = pushed(server, tmp_path, policy, dialect=dialect, concurrency=1)
    server.restarts_before = 8
    with pytest.warns(UserWarning, match="has lost the weights"):
        found = [answer for answers in made.stream(chunks(policy), SHORT) for answer in answers]
    assert_same(found, in_process(policy, requests(policy)))
    assert 9 <= len(server.asked) <= 15 and len(server.loads) == 2, "the first chunk was not asked for again"


class Scored(Callback):
    """How many answers there were when each chunk was handed to the rewards."""

    def __init__(self, server: FakeServer) -> None:
        self.server = server
        self.seen: list[tuple[int, int]] = []

    def on_rollout_chunk(self, trainer: Any, module: Any, media: Any, info: Any, total: int) -> None:
        self.seen.append((len(media), len(self.server.asked)))


def test_a_rollout_of_several_chunks_is_one_stream(base: Path, server: FakeServer, tmp_path: Path) -> None:
    """Two chunks of 8 answers: the second is asked for before the first is scored, and the run is that in process."""
    seen = Scored(server)
    made = pushed(server, tmp_path, loaded(base, LORA))
    server.asked.clear()
    server.backwards = 16
    torch.manual_seed(0)
    over_http = run(base, LORA, made, 1, seen, limit_val_batches=0)
    assert seen.seen == [(8, 16), (8, 16)]
    torch.manual_seed(0)
    assert torch.allclose(over_http, run(base, LORA, HFEngine(), 1, limit_val_batches=0), atol=1e-6, rtol=0)
