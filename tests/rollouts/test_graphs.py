"""Steps of decoding of unchanging shapes: the same answers on a CPU, and what a GPU would be asked to capture and replay."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rough_lm import farthest, policy_of, ready, requests
from torch import Tensor

from lit_rl.errors import ConfigError
from lit_rl.miniatures.lm import Family
from lit_rl.rollouts import graphs, room
from lit_rl.rollouts.base import Sampling
from lit_rl.rollouts.decoder import Decoder
from lit_rl.rollouts.native import NativeEngine
from lit_rl.rollouts.start_check import check_sampler


@pytest.mark.parametrize(
    ("family", "sampling"),
    [
        ("qwen2", Sampling(max_new_tokens=20)),
        ("qwen3", Sampling(max_new_tokens=20, top_k=5)),
        ("llama", Sampling(max_new_tokens=30, top_p=0.9)),
    ],
)
def test_static_steps_give_the_answers_of_growing_ones(
    family: Family, sampling: Sampling, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """15 requests through 4 rows, some idle at the end; three widths of what a step looks at; prompts are shared without the option."""
    monkeypatch.setattr(graphs, "BUCKET", 16)
    monkeypatch.setattr(room, "WORTH_SHARING", {"cpu": 0, "cuda": 0})
    policy, seen = policy_of(tmp_path, family), set()
    asked = requests(policy)
    expected = ready(NativeEngine(batch=4), policy).generate(asked, sampling)
    original = Decoder.step

    def watched(self: Decoder, tokens: Tensor, positions: Tensor, *rest: Any, newest: int, columns: Tensor | None = None) -> Tensor:
        seen.add((len(tokens), newest + 1, tokens.data_ptr(), positions.data_ptr()))
        return original(self, tokens, positions, *rest, newest=newest, columns=columns)

    monkeypatch.setattr(Decoder, "step", watched)
    found = ready(NativeEngine(batch=4, cuda_graphs=True), policy).generate(asked, sampling)
    assert [(a.ids, a.finish) for a in found] == [(a.ids, a.finish) for a in expected]
    assert max(farthest(a.logprobs, b.logprobs) for a, b in zip(found, expected)) < 1e-5
    rows, widths = {step[0] for step in seen}, sorted({step[1] for step in seen})
    whole = max(len(request.prompt) for request in asked) + sampling.max_new_tokens - 1
    assert rows == {4} and len(seen) == len(widths) and widths[:-1] == list(range(widths[0], widths[-1], 16)) and widths[-1] <= whole


def test_a_replay_that_does_not_see_its_tokens_stops_the_run_at_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph goes on with the tokens of its capture: the start check names the option. With the right ones it finds nothing."""
    policy = policy_of(tmp_path, "qwen2")
    engine = ready(NativeEngine(batch=2, cuda_graphs=True), policy)
    check_sampler(policy, engine, Sampling(max_new_tokens=8), world_size=1)
    original = graphs.StaticSteps.step

    def stale(self: graphs.StaticSteps, columns: int) -> Tensor:
        self.tokens = torch.zeros_like(self.tokens)
        return original(self, columns)

    monkeypatch.setattr(graphs.StaticSteps, "step", stale)
    with pytest.raises(ConfigError, match=r"as CUDA graphs .* set model\.answers\.engine\.cuda_graphs to false"):
        check_sampler(policy, engine, Sampling(max_new_tokens=8), world_size=1)


class FakeCuda:
    """torch.cuda as far as a capture needs it: it notes what is asked of it."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def graph_class(self) -> Any:
        return SimpleNamespace(replay=lambda: self.asked.append("replay"), pool=lambda: "pool")

    @contextmanager
    def capture(self, graph: object, pool: object) -> Iterator[None]:
        self.asked.append(f"capture in {pool}")
        yield

    def stream(self) -> Any:
        return SimpleNamespace(wait_stream=lambda other: self.asked.append("wait"))

    @contextmanager
    def beside(self, stream: object) -> Iterator[None]:
        yield


def test_a_gpu_captures_a_step_once_and_replays_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warm-up beside the main stream, capture, replays into the same tensor; later graphs share the first one's memory."""
    fake, result = FakeCuda(), torch.zeros(3)
    for name, value in {
        "CUDAGraph": fake.graph_class, "graph": fake.capture, "Stream": fake.stream, "current_stream": fake.stream, "stream": fake.beside,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)

    def compute() -> Tensor:
        fake.asked.append("compute")
        return result

    first = graphs.captured(compute, torch.device("cuda"), others=[])
    assert first() is result and first() is result
    assert fake.asked == ["wait", "compute", "wait", "capture in None", "compute", "replay", "replay"]
    graphs.captured(compute, torch.device("cuda"), others=[first])
    assert fake.asked[-2:] == ["capture in pool", "compute"]
    assert graphs.captured(compute, torch.device("cpu"), others=[]) is compute
