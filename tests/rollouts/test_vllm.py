"""A real vLLM on the CPU takes the trainer's weights and answers with its log-probabilities: `make test-vllm`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from digit_world import agent, digit_tasks
from rollouts import contract
from rollouts.contract import ADAPTERS, EVERY, LAST, WHOLE, Check, Served, hold
from rollouts.vllm_server import ServerProcess, vllm
from rollouts.vllm_training import assert_within_noise, level, rewards
from rough_lm import roughen
from test_asynchronous import Late
from test_contract import adapter
from test_http import move
from toy_text import trainer
from transformers import AutoModelForCausalLM

from lit_rl.miniatures.lm import build_lm
from lit_rl.policies.causal_lm import CausalLM
from lit_rl.policies.weights.lora import LoraSettings
from lit_rl.rollouts.answers import Answers
from lit_rl.rollouts.base import Request, RolloutError, Sample, Sampling
from lit_rl.rollouts.connection import Call
from lit_rl.rollouts.http import HTTPEngine
from lit_rl.rollouts.native import NativeEngine
from lit_rl.rollouts.probe import trainer_logprobs

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]

LORA = LoraSettings(rank=8, alpha=16)
PROBE = "12+34=46 # 0123456789"
CLOSE = 1e-4
NAMES = ["--served-model-name", "first", "second", "--max-model-len", str(contract.MOST), "--api-key", contract.TOKEN]
dialects = pytest.mark.parametrize("dialect", ["openai", "vllm"])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its attention heads are as wide as the least that vLLM's CPU attention takes: 32."""
    folder = tmp_path_factory.mktemp("vllm") / "model"
    build_lm(folder, characters="0123456789+=# ?", chat=False, hidden=64, layers=2, heads=2, kv_heads=2)
    lm = AutoModelForCausalLM.from_pretrained(folder)
    roughen(lm)
    lm.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROLLOUT_TOKEN", contract.TOKEN)


def running(server: ServerProcess) -> Iterator[ServerProcess]:
    server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def adapters(model: Path) -> Iterator[ServerProcess]:
    yield from running(vllm("adapters", model, model.parent / "adapters.log", *NAMES, rank=contract.MAX_RANK))


@pytest.fixture(scope="module")
def whole(model: Path, adapters: ServerProcess) -> Iterator[ServerProcess]:
    """A server of whole weights; the one before is stopped first."""
    adapters.stop()
    yield from running(vllm("whole", model, model.parent / "whole.log", *NAMES))


def loaded(model: Path, lora: LoraSettings | None) -> CausalLM:
    found = CausalLM(str(model), lora=lora)
    found.load()
    move(found, 0.05)
    return found.eval()


def engine(server: ServerProcess, folder: Path, dialect: str = "openai", name: str | None = None) -> HTTPEngine:
    times = {"health_s": 240.0, "deadline_s": 60.0, "down_s": 20.0}
    return HTTPEngine(server.url, str(folder / "sync"), dialect=dialect, model=name, probe=PROBE, probe_tolerance=CLOSE, **times)  # type: ignore[arg-type]


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


def pushes(made: HTTPEngine, policy: CausalLM, count: int = 3) -> None:
    made.setup(policy, rank=0, world_size=1)
    assert made.max_model_len == contract.MOST
    for version in range(count):
        move(policy, 0.03, seed=version)
        made.update_weights(version)
        check_answers(made, policy)


# ---------------------------------------------------------------------- adapters
@pytest.mark.parametrize("check", [*EVERY, *ADAPTERS], ids=lambda check: check.__name__)
def test_adapters_are_served_as_by_the_server_of_the_tests(check: Check, model: Path, adapters: ServerProcess, tmp_path: Path) -> None:
    narrow, wide = (adapter(model, tmp_path / str(rank), rank) for rank in (contract.MAX_RANK, 2 * contract.MAX_RANK))
    hold(check, Served(adapters.url, adapter=narrow, wide=wide))


@dialects
def test_adapters(dialect: str, model: Path, adapters: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three pushes; then the server forgets the adapter inside an iteration."""
    policy = loaded(model, LORA)
    two_stops(policy, monkeypatch)
    made = engine(adapters, tmp_path, dialect, "second")
    pushes(made, policy)
    before = made.generate(requests(policy), Sampling(max_new_tokens=8))
    made.connection.run([Call([adapters.url], *made.dialect.unload_adapter(made.model), made.dialect.read_load)])
    assert [s.ids for s in made.generate(requests(policy), Sampling(max_new_tokens=8))] == [s.ids for s in before]


# ---------------------------------------------------------------------- trainings
def check_training(model: Path, lora: LoraSettings | None, server: ServerProcess, folder: Path) -> None:
    """20 iterations over HTTP, in turns and asynchronous, are those in process: the server draws other answers, so within noise.

    Noise is what seeds of runs in process differ by. What is asynchronous is compared with answers of an iteration ago.
    """
    present = [level(rewards(model, lora, NativeEngine(), seed=seed)) for seed in range(3)]
    late = [level(rewards(model, lora, Late(NativeEngine), seed=seed, late=True)) for seed in range(3)]
    in_turns = level(rewards(model, lora, engine(server, folder / "turns", "vllm")))
    ahead = level(rewards(model, lora, engine(server, folder / "ahead"), asynchronous=True, late=True))
    assert_within_noise({"in turns": (in_turns, present), "asynchronous": (ahead, late)})


@dialects
def test_siblings_of_an_agent_are_asked_and_trained_at_temperatures_of_their_own(
    dialect: str, model: Path, adapters: ServerProcess, tmp_path: Path
) -> None:
    """0.7, 0.9, 1.1, 1.3: the server's log-probabilities are those that the trainer computes at each."""
    answers = Answers(
        engine=engine(adapters, tmp_path, dialect), sampling=Sampling(max_new_tokens=4, temperature=0.7), old_logprobs="recompute"
    )
    made = agent(model, lora=LORA, group_size=4, temperature_increment=0.2, answers=answers)
    trainer(max_epochs=1, limit_val_batches=0, callbacks=[]).fit(made, datamodule=digit_tasks(tmp_path))
    rollout, own = made.rollout, made.rollout.columns["temperature"]
    torch.testing.assert_close(own, 0.7 + 0.2 * rollout.columns["trajectory"])
    told = rollout.streams["behaviour"][rollout.mask]
    assert len(own.unique()) == 4 and (rollout.logprobs[rollout.mask] - told).abs().max() < CLOSE
    alike = made.all_logprobs(replace(rollout, columns={}), temperature=0.7)[rollout.mask]
    assert (alike - told).abs().max() > 0.01  # as if all had been drawn at the first


def test_training_with_adapters_learns_as_in_process(model: Path, adapters: ServerProcess, tmp_path: Path) -> None:
    check_training(model, LORA, adapters, tmp_path)


# ---------------------------------------------------------------------- whole weights
@pytest.mark.parametrize("check", [*EVERY, *WHOLE], ids=lambda check: check.__name__)
def test_whole_weights_are_served_as_by_the_server_of_the_tests(check: Check, whole: ServerProcess) -> None:
    hold(check, Served(whole.url))


@dialects
def test_whole_weights(dialect: str, model: Path, whole: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long prompts show whether the prefix cache was reset."""
    policy = loaded(model, None)
    two_stops(policy, monkeypatch)
    made = engine(whole, tmp_path, dialect)
    pushes(made, policy)
    whole_version = made.connection.run([Call([whole.url], "/weight_info", None, lambda body: body)])[0]
    assert whole_version == {"weight_version": made.model}


def test_training_of_all_weights_learns_as_in_process(model: Path, whole: ServerProcess, tmp_path: Path) -> None:
    check_training(model, None, whole, tmp_path)


# ---------------------------------------------------------------------- restarts and ends
def check_raw(made: HTTPEngine, policy: CausalLM) -> None:
    """Log-probabilities of temperature 1 and of all tokens are right there with top_p and top_k too, and found out elsewhere."""
    for shape in ({"top_p": 0.6}, {"top_k": 4}, {"top_p": 0.8, "top_k": 6}):
        made.unseen = True
        samples = made.generate(requests(policy), Sampling(max_new_tokens=16, **shape))  # type: ignore[arg-type]
        assert gap(policy, requests(policy), samples, 1.0) < CLOSE
    made.unseen = True
    with pytest.raises(RolloutError, match="processed_logprobs"):
        made.generate(requests(policy), Sampling(max_new_tokens=16, temperature=0.7))


def test_a_restart_is_noticed_and_an_end_too(model: Path, whole: ServerProcess, tmp_path: Path) -> None:
    """It comes back with raw log-probabilities, vLLM's default."""
    policy = loaded(model, None)
    engines = [engine(whole, tmp_path / dialect, dialect) for dialect in ("openai", "vllm")]
    for made in engines:
        made.setup(policy, rank=0, world_size=1)
        made.update_weights(0)
    before = made.generate(requests(policy), Sampling(max_new_tokens=8))
    whole.stop()
    whole.command += ["--logprobs-mode", "raw_logprobs"]
    whole.start()
    for made in engines:
        again = made.generate(requests(policy), Sampling(max_new_tokens=8))
        assert [s.ids for s in again] == [s.ids for s in before] and gap(policy, requests(policy), again, 1.0) < CLOSE
        check_raw(made, policy)
    for check in LAST:
        hold(check, Served(whole.url))
    made.connection.down_s, began = 2.0, time.monotonic()
    with pytest.raises(RolloutError, match="EngineCore encountered an issue|the server is gone"):
        made.generate(requests(policy), Sampling(max_new_tokens=8))
    whole.stop()
    with pytest.raises(RolloutError, match="the server is gone"):
        made.generate(requests(policy), Sampling(max_new_tokens=8))
    assert time.monotonic() - began < 30
