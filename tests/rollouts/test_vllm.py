"""A real vLLM on the CPU takes the trainer's weights and answers with its log-probabilities: `make test-vllm`."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from test_http import Small, move
from toy_text import Digits, trainer

from callbacks.reward_scoring import RewardScoring
from lit_rl.methods.grpo import GRPO
from lit_rl.miniatures.lm import build_lm
from lit_rl.policies.causal_lm import CausalLM
from lit_rl.policies.weights.lora import LoraSettings
from lit_rl.rollouts.answers import Answers
from lit_rl.rollouts.base import Request, RolloutEngine, RolloutError, Sample, Sampling
from lit_rl.rollouts.connection import Call
from lit_rl.rollouts.http import HTTPEngine
from lit_rl.rollouts.native import NativeEngine
from lit_rl.rollouts.probe import trainer_logprobs

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

LORA = LoraSettings(rank=8, alpha=16)
PROBE = "12+34=46 # 0123456789"
CLOSE = 1e-4
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class VLLM:
    """One server process with all its children, in a process group of its own."""

    def __init__(self, model: Path, log: Path, *options: str) -> None:
        self.port, self.log = free_port(), log
        self.command = [os.environ.get("VLLM_PYTHON", ".venv-vllm/bin/python"), "-m", "vllm.entrypoints.openai.api_server"]
        self.command += ["--model", str(model), "--host", "127.0.0.1", "--port", str(self.port), "--dtype", "float32"]
        self.command += ["--max-model-len", "512", "--max-num-seqs", "32", "--gpu-memory-utilization", "0.1"]
        self.command += ["--logprobs-mode", "processed_logprobs", "--enforce-eager", *options]
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | ENVIRONMENT
        with self.log.open("a") as log:
            self.process = subprocess.Popen(self.command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

    def stop(self) -> None:
        """End the process group: the engine is a child that outlives its parent otherwise."""
        for sent in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, sent)
            except ProcessLookupError:
                return
            until = time.monotonic() + 10
            while time.monotonic() < until and self.process.poll() is None:
                time.sleep(0.1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its attention heads are as wide as the least that vLLM's CPU attention takes: 32."""
    folder = tmp_path_factory.mktemp("vllm") / "model"
    return build_lm(folder, characters="0123456789+=# ?", chat=False, hidden=64, layers=2, heads=2, kv_heads=2)


def running(server: VLLM) -> Iterator[VLLM]:
    server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def adapters(model: Path) -> Iterator[VLLM]:
    """A server of adapters, with two names of the base model."""
    names = ["--served-model-name", "first", "second"]
    yield from running(VLLM(model, model.parent / "adapters.log", "--enable-lora", "--max-lora-rank", "8", "--max-loras", "2", *names))


@pytest.fixture(scope="module")
def whole(model: Path, adapters: VLLM) -> Iterator[VLLM]:
    """A server of whole weights; the one before is stopped first."""
    adapters.stop()
    yield from running(VLLM(model, model.parent / "whole.log"))


def loaded(model: Path, lora: LoraSettings | None) -> CausalLM:
    found = CausalLM(str(model), lora=lora)
    found.load()
    move(found, 0.05)
    return found.eval()


def engine(server: VLLM, folder: Path, name: str | None = None) -> HTTPEngine:
    return HTTPEngine(
        server.url, str(folder / "sync"), model=name, probe=PROBE, probe_tolerance=CLOSE, health_s=240, deadline_s=60, down_s=20
    )


def requests(policy: CausalLM) -> list[Request]:
    """Prompts of which one is longer than a block of the prefix cache (128 tokens)."""
    return [Request(policy.encode(text), (text, i)) for text in ("12=", "7", "0451=" * 40) for i in range(4)]


def gap(policy: CausalLM, asked: Sequence[Request], samples: Sequence[Sample], temperature: float) -> float:
    mine = trainer_logprobs(policy, [(r.prompt, s.ids) for r, s in zip(asked, samples)], temperature=temperature)
    return max(abs(a - b) for s, row in zip(samples, mine) for a, b in zip(s.logprobs, row))


def check_answers(made: HTTPEngine, policy: CausalLM) -> None:
    """Log-probabilities at two temperatures, seeds together and alone, two stop tokens."""
    asked = requests(policy)
    for temperature in (1.0, 0.7):
        sampling = Sampling(max_new_tokens=16, temperature=temperature)
        samples = made.generate(asked, sampling)
        assert gap(policy, asked, samples, temperature) < CLOSE
        assert [s.ids for s in made.generate(asked[:2], sampling)] == [s.ids for s in samples[:2]]
        for sample in samples:
            assert (sample.ids[-1] in policy.stop_ids) == (sample.finish == "stop")
            assert not set(sample.ids[:-1]) & set(policy.stop_ids)


def two_stops(policy: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    stops = [*policy.stop_ids, policy.encode("#")[0]]
    monkeypatch.setattr(type(policy), "stop_ids", property(lambda _: stops))


def test_adapters(model: Path, adapters: VLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three pushes; then the server forgets the adapter inside an iteration."""
    policy = loaded(model, LORA)
    two_stops(policy, monkeypatch)
    made = engine(adapters, tmp_path, "second")
    made.setup(policy, rank=0, world_size=1)
    assert made.max_model_len == 512
    for version in range(3):
        move(policy, 0.03, seed=version)
        made.update_weights(version)
        check_answers(made, policy)
    before = made.generate(requests(policy), Sampling(max_new_tokens=8))
    made.connection.run([Call([adapters.url], *made.dialect.unload_adapter(made.model), made.dialect.read_load)])
    assert [s.ids for s in made.generate(requests(policy), Sampling(max_new_tokens=8))] == [s.ids for s in before]


class Rewards(Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seen.append(float(trainer.callback_metrics["reward_mean"]))


def fit(model: Path, made: RolloutEngine, *, asynchronous: bool = False) -> list[float]:
    torch.manual_seed(0)
    old: Literal["auto", "rollout"] = "rollout" if asynchronous else "auto"
    method = GRPO(
        CausalLM(str(model), lora=LORA),
        answers=Answers(engine=made, sampling=Sampling(max_new_tokens=6), chunk=32, asynchronous=asynchronous, old_logprobs=old),
        prompts_per_iteration=4,
        group_size=8,
        optimizer=partial(torch.optim.AdamW, lr=1e-2),
    )
    rewards = Rewards()
    callbacks = [RewardScoring({"small": Small()}), rewards]
    trainer(max_epochs=20, callbacks=callbacks, limit_val_batches=0, enable_checkpointing=False).fit(method, datamodule=Digits())
    return rewards.seen


def test_training_learns_as_in_process(model: Path, adapters: VLLM, tmp_path: Path) -> None:
    """20 iterations: in process, over HTTP, and asynchronous; the server draws other answers, so the curves agree within noise."""
    runs: dict[str, Callable[[], list[float]]] = {
        "native": lambda: fit(model, NativeEngine()),
        "http": lambda: fit(model, engine(adapters, tmp_path / "http")),
        "asynchronous": lambda: fit(model, engine(adapters, tmp_path / "ahead"), asynchronous=True),
    }
    rise, last = {}, {}
    for name, run in runs.items():
        seen = run()
        assert len(seen) == 20
        last[name] = sum(seen[-4:]) / 4
        rise[name] = last[name] - sum(seen[:2]) / 2
    print("rise", rise, "last four", last)
    assert min(rise.values()) > 0.1
    assert max(last.values()) - min(last.values()) < 0.2


def test_whole_weights_a_restart_and_a_death(model: Path, whole: VLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long prompts show whether the prefix cache was reset; a real restart is noticed, and so is a server that does not come back."""
    policy = loaded(model, None)
    two_stops(policy, monkeypatch)
    made = engine(whole, tmp_path)
    made.setup(policy, rank=0, world_size=1)
    for version in range(3):
        move(policy, 0.03, seed=version)
        made.update_weights(version)
        check_answers(made, policy)
    before = made.generate(requests(policy), Sampling(max_new_tokens=8))
    whole.stop()
    whole.start()
    made.connection.wait_healthy([whole.url], patience_s=240)
    again = made.generate(requests(policy), Sampling(max_new_tokens=8))
    assert [s.ids for s in again] == [s.ids for s in before] and gap(policy, requests(policy), again, 1.0) < CLOSE
    whole.stop()
    made.connection.down_s, began = 2.0, time.monotonic()
    with pytest.raises(RolloutError, match="the server is gone"):
        made.generate(requests(policy), Sampling(max_new_tokens=8))
    assert time.monotonic() - began < 15
