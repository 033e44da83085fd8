"""All requests of a rollout are under way at once, whichever chunk they are of."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_server import FakeServer
from lightning import Callback
from rewards.fault_proxy import Fault
from test_http import LORA, SHORT, Small, assert_same, in_process, loaded, pushed, requests, run
from torch import Tensor

from lit_rl.rollouts.base import Request, RolloutError, Sample
from lit_rl.rollouts.hf import HFEngine
from lit_rl.types import Info, TokenRollout


def chunks(policy: Any) -> list[list[Request]]:
    """Three siblings of each of three prompts, a chunk for each prompt, and one that is empty."""
    asked = requests(policy)
    return [asked[:3], [], asked[3:6], asked[6:]]


def in_order(found: Iterable[tuple[int, list[Sample]]]) -> list[Sample]:
    return [answer for _, answers in sorted(found, key=lambda pair: pair[0]) for answer in answers]


def test_a_slow_answer_in_one_chunk_holds_no_other(base: Path, server: FakeServer, tmp_path: Path) -> None:
    """The first chunk is there last: the others waited for nothing."""
    policy = loaded(base, LORA)
    made = pushed(server, tmp_path, policy)
    server.held = {tuple(policy.encode("12=")): 6}
    found = list(made.stream(chunks(policy), SHORT))
    assert [place for place, _ in found][-1] == 0 and {place for place, _ in found} == {0, 1, 2, 3}
    assert [len(answers) for _, answers in sorted(found)] == [3, 0, 3, 3]
    assert_same(in_order(found), in_process(policy, requests(policy)))


@pytest.mark.parametrize("concurrency", [1, 4])
def test_no_more_requests_than_asked_for_are_under_way(concurrency: int, base: Path, server: FakeServer, tmp_path: Path) -> None:
    policy = loaded(base, LORA)
    made = pushed(server, tmp_path, policy, concurrency=concurrency)
    server.slow = {tuple(request.prompt): 0.05 for request in requests(policy)}
    assert len(in_order(made.stream(chunks(policy), SHORT))) == 9
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
    made = pushed(server, tmp_path, policy, timeout_s=100.0, deadline_s=100.0)
    server.faults = iter([Fault("hang")] * 3 + [Fault("status", 400)] * 9)
    began = time.monotonic()
    with pytest.raises(RolloutError, match="status 400"):
        list(made.stream(chunks(policy), SHORT))
    assert time.monotonic() - began < 40


@pytest.mark.parametrize(("dialect", "lora"), [("openai", LORA), ("openai", None), ("vllm", None)], ids=["lora", "full", "vllm"])
def test_a_restart_asks_anew_for_the_chunks_that_are_not_there_yet(
    dialect: str, lora: Any, base: Path, server: FakeServer, tmp_path: Path
) -> None:
    policy = loaded(base, lora, shift=0.05)
    made = pushed(server, tmp_path, policy, dialect=dialect, concurrency=1)
    server.restarts_before = 8
    with pytest.warns(UserWarning, match="has lost the weights"):
        found = list(made.stream(chunks(policy), SHORT))
    assert_same(in_order(found), in_process(policy, requests(policy)))
    assert 9 <= len(server.asked) <= 15 and len(server.loads) == 2, "the first chunk was not asked for again"


class Scored(Callback):
    """The texts of each chunk that callbacks are told of, and the first prompt of the rollout."""

    def __init__(self) -> None:
        self.seen: list[list[str]] = []

    def on_rollout_chunk(self, trainer: Any, module: Any, media: Any, info: Any, total: int) -> None:
        self.seen.append([str(text) for text in media])

    def on_rollout_end(self, trainer: Any, module: Any, rollout: TokenRollout) -> None:
        self.prompt = tuple(rollout.tokens[0, : int(rollout.mask[0].int().argmax()) + 1].tolist())


class Late(Small):
    """Notes when texts are scored."""

    def __init__(self) -> None:
        self.seen: list[list[str]] = []

    def score(self, media: Sequence[str], info: Sequence[Info]) -> Mapping[str, Tensor]:
        self.seen.append([str(text) for text in media])
        return super().score(media, info)


def test_a_chunk_is_scored_when_it_is_there_and_told_of_in_order(base: Path, server: FakeServer, tmp_path: Path) -> None:
    """Two chunks of 8 answers, of which the first has a slow one: the second is scored first, and the run is that in process."""
    expected, seen, reward = Scored(), Scored(), Late()
    torch.manual_seed(0)
    inside = run(base, LORA, HFEngine(), 1, expected, limit_val_batches=0)
    made = pushed(server, tmp_path, loaded(base, LORA))
    server.held = {expected.prompt: 12}
    torch.manual_seed(0)
    over_http = run(base, LORA, made, 1, seen, limit_val_batches=0, reward=reward)
    assert seen.seen == expected.seen and [len(texts) for texts in seen.seen] == [8, 8]
    assert reward.seen == expected.seen[::-1]
    assert torch.allclose(over_http, inside, atol=1e-6, rtol=0)
