"""Answers drawn while the last iteration trains: one iteration old, weighed for it, and in the checkpoint."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_server import FakeServer
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from rewards.fault_proxy import Fault
from test_http import LORA, engine, run
from toy_text import policy

from lit_rl.errors import ConfigError
from lit_rl.losses.off_policy import Correction
from lit_rl.methods.grpo import DAPO, GRPO
from lit_rl.policies.base import TokenPolicy
from lit_rl.rollouts.answers import Answers
from lit_rl.rollouts.base import Request, RolloutEngine, RolloutError, Sample, Sampling
from lit_rl.rollouts.hf import HFEngine
from lit_rl.rollouts.http import HTTPEngine

ASYNC: dict[str, Any] = {"asynchronous": True, "correction": Correction(), "prompts_per_update": 2}
LATE: dict[str, Any] = {**ASYNC, "asynchronous": False}


class Late(RolloutEngine):
    """Answers with the weights of an iteration ago; those of the first iteration are its own."""

    def __init__(self, answering: type[RolloutEngine] = HFEngine) -> None:
        self.answering = answering

    def setup(self, policy: TokenPolicy, *, rank: int, world_size: int) -> None:
        super().setup(policy, rank=rank, world_size=world_size)
        self.copies: list[TokenPolicy] = []

    def update_weights(self, version: int) -> None:
        self.copies.append(copy.deepcopy(self.policy))

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Sample]:
        answering = self.answering()
        answering.setup(self.copies[max(0, len(self.copies) - 2)], rank=0, world_size=1)
        return answering.generate(requests, sampling)


class Watch(Callback):
    """Each iteration's metrics, and whether answers of the next one are asked for before it has trained."""

    def __init__(self, running: FakeServer, answers: int = 16) -> None:
        self.running, self.answers = running, answers
        self.metrics: list[dict[str, float]] = []
        self.ahead: list[bool] = []

    def on_rollout_end(self, trainer: Any, module: Any, rollout: Any) -> None:
        self.metrics.append(dict(module.rollout_metrics))

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        until = time.monotonic() + 30
        while (asked := len(self.running.asked) > self.answers * len(self.metrics)) is False and time.monotonic() < until:
            if len(self.metrics) == trainer.max_epochs:
                break
            time.sleep(0.01)
        self.ahead.append(asked)


@pytest.mark.parametrize(("dialect", "lora"), [("openai", LORA), ("sglang", None)], ids=["openai-lora", "sglang-full"])
def test_it_trains_as_a_sampler_that_is_one_iteration_late(
    dialect: str,
    lora: Any,
    base: Path,
    server: FakeServer,
    tmp_path: Path,
) -> None:
    """Three iterations of two optimizer steps; evaluations in between push weights too, after the answers are there."""
    watch = Watch(server)
    torch.manual_seed(0)
    ahead = run(base, lora, engine(server, tmp_path, dialect=dialect), 3, watch, limit_val_batches=0, **ASYNC)
    torch.manual_seed(0)
    late = run(base, lora, Late(), 3, limit_val_batches=0, **LATE)
    torch.manual_seed(0)
    present = run(base, lora, HFEngine(), 3, limit_val_batches=0, **LATE)
    assert torch.allclose(ahead, late, atol=1e-6, rtol=0)
    assert float((late - present).abs().max()) > 1e-4
    assert [metrics["async/staleness"] for metrics in watch.metrics] == [0, 1, 1]
    assert watch.ahead == [True] * 4 + [False] * 2, "asked for while the iteration trains, but for one that does not come"
    torch.manual_seed(0)
    assert torch.equal(run(base, lora, engine(server, tmp_path, dialect=dialect), 3, **ASYNC), ahead)


@pytest.fixture(scope="module")
def unbroken(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, torch.Tensor]]:
    """Checkpoints after each of six optimizer steps, and the weights at the end."""
    folder = tmp_path_factory.mktemp("unbroken")
    keep = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    torch.manual_seed(0)
    with FakeServer(base) as running:
        yield folder, run(base, LORA, engine(running, folder), 3, keep, **ASYNC)


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_a_resumed_run_is_the_unbroken_run(
    step: int,
    unbroken: tuple[Path, torch.Tensor],
    base: Path,
    server: FakeServer,
    tmp_path: Path,
) -> None:
    """Inside an iteration and at its end: the weights that drew the answers under way are gone, the answers are not."""
    folder, ended = unbroken
    assert torch.equal(run(base, LORA, engine(server, tmp_path), 3, ckpt=folder / f"step={step}.ckpt", **ASYNC), ended)


def test_answers_that_fail_stop_the_run_where_they_are_needed(base: Path, server: FakeServer, tmp_path: Path) -> None:
    """The steps trained meanwhile are saved."""
    server.faults = iter([Fault("ok")] * 16 + [Fault("status", 400)] * 16)
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    with pytest.raises(RolloutError, match="status 400"):
        run(base, LORA, engine(server, tmp_path), 3, keep, limit_val_batches=0, **ASYNC)
    assert (tmp_path / "step=2.ckpt").is_file() and not (tmp_path / "step=3.ckpt").exists()


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (GRPO, {"engine": HFEngine()}, "HFEngine answers from those that train: set model.answers.engine to .*HTTPEngine"),
        (GRPO, {"correction": None}, "nothing corrects for that: set model.correction"),
        (DAPO, {}, "DAPO chooses what to generate while it generates"),
    ],
)
def test_what_cannot_be_asynchronous_is_refused(method: Any, settings: Any, message: str, base: Path) -> None:
    given: dict[str, Any] = {"prompts_per_iteration": 4, "group_size": 4, "correction": Correction()} | settings
    with pytest.raises(ConfigError, match=message):
        answers = Answers(engine=given.pop("engine", HTTPEngine("localhost:8000", "sync")), asynchronous=True)
        method(policy(base), answers=answers, **given)
