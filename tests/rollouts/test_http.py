"""Answers over HTTP are the policy's own, whatever happens on the way; a server with other weights stops the run."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_server import BASE, FakeServer
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from rewards.fault_proxy import Fault
from torch import Tensor
from toy_text import Digits, model_folder, policy, trainer

from callbacks.ema import EMA
from callbacks.reward_scoring import RewardScoring
from datamodules.prompts_text import TextPrompts
from lit_rl.errors import ConfigError
from lit_rl.methods.grpo import GRPO
from lit_rl.policies.causal_lm import CausalLM
from lit_rl.policies.weights.lora import LoraSettings
from lit_rl.rewards.base import TextReward
from lit_rl.rollouts.answers import Answers
from lit_rl.rollouts.base import Request, RolloutEngine, RolloutError, Sample, Sampling
from lit_rl.rollouts.hf import HFEngine
from lit_rl.rollouts.http import HTTPEngine
from lit_rl.rollouts.probe import distinct
from lit_rl.rollouts.push import gather, write
from lit_rl.types import Info

SHORT = Sampling(max_new_tokens=6)
LORA = LoraSettings(rank=4, alpha=8)
WAYS = [(dialect, lora) for dialect in ("openai", "vllm", "sglang") for lora in (LORA, None)]
ways = pytest.mark.parametrize(
    ("dialect", "lora"), WAYS, ids=lambda value: value if isinstance(value, str) else "lora" if value else "full"
)


def loaded(base: Path, lora: LoraSettings | None, *, shift: float = 0.0) -> CausalLM:
    """The policy, some steps from the base."""
    found = policy(base, lora=lora)
    found.load()
    move(found, shift)
    return found.eval()


@torch.no_grad()
def move(moved: CausalLM, by: float, seed: int = 0) -> None:
    drawn = torch.Generator().manual_seed(seed)
    for _, parameter in moved.trainable():
        parameter += by * torch.randn(parameter.shape, generator=drawn)


def engine(server: FakeServer, folder: Path, **settings: Any) -> HTTPEngine:
    given = {"timeout_s": 5.0, "deadline_s": 10.0, "health_s": 5.0, "probe_tolerance": 1e-4}
    return HTTPEngine(server.url, str(folder / "sync"), **given | settings)


def pushed(server: FakeServer, folder: Path, answering: CausalLM, version: int = 0, **settings: Any) -> HTTPEngine:
    made = engine(server, folder, **settings)
    made.setup(answering, rank=0, world_size=1)
    made.update_weights(version)
    return made


def requests(asked: CausalLM, group: int = 3) -> list[Request]:
    return [Request(asked.encode(text), (0, text, i)) for text in ("12=", "7", "0451=") for i in range(group)]


def in_process(answering: CausalLM, asked: Sequence[Request], sampling: Sampling = SHORT) -> list[Sample]:
    other = HFEngine()
    other.setup(answering, rank=0, world_size=1)
    return other.generate(asked, sampling)


def assert_same(found: Sequence[Sample], expected: Sequence[Sample]) -> None:
    assert [(s.ids, s.finish) for s in found] == [(s.ids, s.finish) for s in expected]
    for a, b in zip(found, expected):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


# ---------------------------------------------------------------------- answers
@ways
@pytest.mark.parametrize(
    "sampling", [SHORT, Sampling(max_new_tokens=6, temperature=0.7, top_k=5), Sampling(max_new_tokens=6, temperature=0.0)]
)
def test_answers_are_those_of_the_engine_in_process(
    dialect: str, lora: LoraSettings | None, sampling: Sampling, base: Path, server: FakeServer, tmp_path: Path
) -> None:
    """9 requests whose answers come in reverse order, from weights that the server was not started with."""
    server.backwards = 9
    answering = loaded(base, lora, shift=0.05)
    found = pushed(server, tmp_path, answering, 3, dialect=dialect).generate(requests(answering), sampling)
    assert_same(found, in_process(answering, requests(answering), sampling))
    assert {version for sample in found for version in sample.versions} == {3}
    assert len({tuple(sample.ids) for sample in found}) > 3 or not sampling.temperature


def test_siblings_may_have_temperatures_of_their_own(base: Path, server: FakeServer, tmp_path: Path) -> None:
    """The server is asked at each, and its answers are compared with the trainer at each."""
    answering = loaded(base, LORA, shift=0.05)
    asked = [replace(request, temperature=[0.4, None, 2.5][i % 3]) for i, request in enumerate(requests(answering))]
    found = pushed(server, tmp_path, answering).generate(asked, SHORT)
    assert_same(found, in_process(answering, asked))
    with pytest.raises(RolloutError, match=r"at temperature 0\.4, 1, 2\.5\), above engine.probe_tolerance"):
        pushed(server, tmp_path, answering, probe_tolerance=1e-3)._look_at(asked[:3], in_process(answering, requests(answering)[:3]), SHORT)


class Small(TextReward):
    """The share of small digits in an answer."""

    outputs = ("small",)

    def score(self, media: Sequence[str], info: Sequence[Info]) -> Mapping[str, Tensor]:
        return {"small": torch.tensor([sum(c in "01234" for c in text) / 6 for text in media])}


def run(
    base: Path,
    lora: LoraSettings | None,
    made: RolloutEngine,
    iterations: int,
    *more: Callback,
    ckpt: Path | None = None,
    save: Path | None = None,
    limit_val_batches: int = 1,
    asynchronous: bool = False,
    reward: TextReward | None = None,
    **settings: Any,
) -> Tensor:
    method = GRPO(
        policy(base, lora=lora),
        answers=Answers(engine=made, sampling=SHORT, chunk=8, asynchronous=asynchronous),
        prompts_per_iteration=4,
        group_size=4,
        optimizer=partial(torch.optim.SGD, lr=0.3),
        **settings,
    )
    checkpoints = any(isinstance(callback, ModelCheckpoint) for callback in more)
    limits: dict[str, Any] = {"limit_val_batches": limit_val_batches, "enable_checkpointing": checkpoints}
    fit = trainer(max_epochs=iterations, callbacks=[RewardScoring({"small": reward or Small()}), *more], **limits)
    fit.fit(method, datamodule=Digits(), ckpt_path=ckpt)
    if save is not None:
        fit.save_checkpoint(save)
    return torch.cat([p.detach().flatten() for _, p in method.policy.trainable()])


def test_a_server_that_takes_fewer_tokens_is_refused_before_the_first_prompt(base: Path, server: FakeServer, tmp_path: Path) -> None:
    """Four tokens of prompt and the longest answer."""
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "270="}) + "\n")
    longest = 4 + SHORT.max_new_tokens
    for most in (longest, longest - 1):
        server.max_model_len = most
        settings: dict[str, Any] = dict(prompts_per_iteration=1, group_size=2)
        method = GRPO(policy(base, lora=LoraSettings(rank=2)), answers=Answers(engine=engine(server, tmp_path), sampling=SHORT), **settings)
        fit = trainer(max_epochs=1, callbacks=[RewardScoring({"small": Small()})], check_val_every_n_epoch=9)
        with nullcontext() if most == longest else pytest.raises(ConfigError, match=f"has {longest} tokens, and the inference .* {most} "):
            fit.fit(method, datamodule=TextPrompts(train=str(tmp_path / "rows.jsonl")))
    assert len(server.asked) == 2  # the first run's


@ways
def test_training_over_http_is_training_in_process(
    dialect: str, lora: LoraSettings | None, base: Path, server: FakeServer, tmp_path: Path
) -> None:
    """Two iterations, an evaluation after each: three sets of weights, each pushed once."""
    torch.manual_seed(0)
    over_http = run(base, lora, engine(server, tmp_path, dialect=dialect), 2)
    torch.manual_seed(0)
    inside = run(base, lora, HFEngine(), 2)
    torch.manual_seed(0)
    before = run(base, lora, HFEngine(), 0)
    assert float((inside - before).abs().max()) > 1e-3
    assert torch.allclose(over_http, inside, atol=1e-6, rtol=0)
    assert len(server.loads) == len(set(server.loads)) == 3


def test_an_average_is_pushed_for_its_evaluation_and_the_weights_for_the_next_rollout(
    base: Path, server: FakeServer, tmp_path: Path
) -> None:
    run(base, LORA, engine(server, tmp_path), 2, EMA(decay=0.9))
    assert [name.rpartition("-")[0] for name in server.loads] == ["policy-v0", "policy-v0", "policy-v1", "policy-v1"]
    assert len(set(server.loads)) == 4


def test_a_resumed_run_is_the_unbroken_run(base: Path, server: FakeServer, tmp_path: Path) -> None:
    """The server still has the adapters of the run that ended, and those of an iteration that the checkpoint knows nothing of."""
    torch.manual_seed(0)
    run(base, LORA, engine(server, tmp_path), 1, save=tmp_path / "now.ckpt")
    stray = loaded(base, LORA, shift=0.1)
    pushed(server, tmp_path, stray, version=1)
    resumed = run(base, LORA, engine(server, tmp_path), 2, ckpt=tmp_path / "now.ckpt")
    torch.manual_seed(0)
    assert torch.equal(resumed, run(base, LORA, HFEngine(), 2))


# ---------------------------------------------------------------------- weights
def test_weights_are_pushed_when_their_contents_change(base: Path, server: FakeServer, tmp_path: Path) -> None:
    answering = loaded(base, LORA)
    made = pushed(server, tmp_path, answering, keep=2)
    first = server.adapters[0]
    assert first.startswith("policy-v0-")
    made.update_weights(1)
    assert server.adapters == [first], "nothing changed but the version"
    names = [first]
    for version in (1, 1, 2):
        move(answering, 0.05, seed=len(names))
        made.update_weights(version)
        names.append(server.adapters[-1])
    assert len(set(names)) == 4 and names[1].rpartition("-")[0] == names[2].rpartition("-")[0] == "policy-v1"
    assert server.adapters == names[-2:]
    assert sorted(folder.name for folder in (tmp_path / "sync").iterdir()) == sorted(names[-2:])
    made.generate(requests(answering), SHORT)
    assert {body["model"] for body in server.asked} == {names[-1]}


def test_two_runs_that_push_the_same_weights_do_not_meet(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have written their files before the first gives the folder its name."""
    answering, written = loaded(base, LORA), threading.Barrier(2)
    save, folder = answering.save, tmp_path / "policy-v0"

    def slowly(*given: Any) -> None:
        save(*given)
        written.wait(30)

    monkeypatch.setattr(answering, "save", slowly)
    weights = gather(answering)
    with ThreadPoolExecutor(2) as threads:
        for done in [threads.submit(write, answering, weights, folder) for _ in range(2)]:
            done.result()
    assert [path.name for path in tmp_path.iterdir()] == ["policy-v0"]
    assert {path.name for path in folder.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}


@ways
def test_a_server_that_keeps_its_weights_is_found_out(
    dialect: str, lora: LoraSettings | None, base: Path, server: FakeServer, tmp_path: Path
) -> None:
    """By a step too small for any tolerance, too."""
    answering = loaded(base, lora, shift=0.01)
    made = pushed(server, tmp_path, answering, dialect=dialect, probe_tolerance=0.5)
    move(answering, 3e-3, seed=1)
    made.update_weights(1)
    server.stale = True
    move(answering, 3e-3, seed=2)
    with pytest.raises(
        RolloutError, match=r"policy-v2-\w+, answers with stale weights.* went from -\d.*and the server's from -\d.*sync_dir"
    ):
        made.update_weights(2)


def test_a_server_of_another_model_is_found_out(base: Path, tmp_path: Path) -> None:
    with (
        FakeServer(model_folder(tmp_path / "other", seed=1)) as server,
        pytest.raises(RolloutError, match=r"other weights.*trainer -.*dtype"),
    ):
        pushed(server, tmp_path, loaded(base, LORA), probe_tolerance=0.05)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_of_another_temperature_are_found_out(temperature: float, base: Path, tmp_path: Path) -> None:
    """At temperature 1 vLLM's default is right, elsewhere it is not."""
    answering = loaded(base, LORA)
    sampling = Sampling(max_new_tokens=6, temperature=temperature)
    with FakeServer(base, raw=True) as server:
        made = pushed(server, tmp_path, answering, probe_tolerance=0.01)
        if temperature == 1:
            assert_same(made.generate(requests(answering), sampling), in_process(answering, requests(answering), sampling))
        else:
            with pytest.raises(RolloutError, match=r"at temperature 0.7.*processed_logprobs.*top_p"):
                made.generate(requests(answering), sampling)


@ways
def test_a_server_that_was_restarted_is_given_its_weights_again(
    dialect: str, lora: LoraSettings | None, base: Path, server: FakeServer, tmp_path: Path
) -> None:
    """Between iterations."""
    answering = loaded(base, lora, shift=0.05)
    made = pushed(server, tmp_path, answering, dialect=dialect)
    expected = in_process(answering, requests(answering))
    server.forget()
    if dialect == "sglang" and lora:
        server.weights_version = "default"
    with pytest.warns(UserWarning, match="has lost the weights"):
        assert_same(made.generate(requests(answering), SHORT), expected)
    assert len(server.loads) == 2


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
def test_a_restart_among_the_answers_of_a_rollout_changes_none(
    lora: LoraSettings | None, base: Path, server: FakeServer, tmp_path: Path
) -> None:
    """The last answers were drawn by the weights that the server was started on: all are asked for again."""
    answering = loaded(base, lora, shift=0.05)
    made = pushed(server, tmp_path, answering, concurrency=1)
    made.unseen = False
    server.restarts_before = 5
    assert_same(made.generate(requests(answering), SHORT), in_process(answering, requests(answering)))
    assert len(server.loads) == 2


def test_whole_weights_take_the_prefix_cache_with_them(base: Path, server: FakeServer, tmp_path: Path) -> None:
    answering = loaded(base, None)
    made = pushed(server, tmp_path, answering)
    move(answering, 0.05)
    made.update_weights(1)
    assert server.resets == 2 and server.weights_version.startswith("policy-v1-")


def test_answers_that_are_looked_at_are_of_different_prompts_the_longest_first() -> None:
    asked = [Request(prompt, (i,)) for i, prompt in enumerate([[1], [1], [2, 3], [2, 3], [4] * 9, [5], [6], [6, 6, 6]])]
    assert distinct(asked, 4) == [4, 7, 2, 0]


def test_a_server_of_several_names_answers_under_the_first(base: Path, server: FakeServer, tmp_path: Path) -> None:
    server.bases = ["first", "second"]
    answering = loaded(base, None, shift=0.05)
    made = pushed(server, tmp_path, answering, model="second")
    assert_same(made.generate(requests(answering), SHORT), in_process(answering, requests(answering)))


def test_a_prompt_without_room_for_its_answer_is_refused(base: Path, server: FakeServer, tmp_path: Path) -> None:
    answering = loaded(base, LORA)
    server.max_model_len = 5 + SHORT.max_new_tokens - 1
    made = pushed(server, tmp_path, answering)
    made.generate(requests(answering)[:3], SHORT)
    with pytest.raises(ConfigError, match=r"a prompt of 5 tokens and max_new_tokens=6 are more than the 10 .*--max-model-len"):
        made.generate(requests(answering), SHORT)


def test_a_dead_server_ends_the_run_long_before_the_deadline(base: Path, server: FakeServer, tmp_path: Path) -> None:
    answering = loaded(base, LORA)
    made = pushed(server, tmp_path, answering, deadline_s=60.0, down_s=0.5)
    server.stop()
    began = time.monotonic()
    with pytest.raises(RolloutError, match=r"the server is gone .*engine.down_s=0.5 s.*--ckpt_path"):
        made.generate(requests(answering), SHORT)
    assert time.monotonic() - began < 40


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
def test_a_push_that_is_refused_says_what_the_server_needs(
    lora: LoraSettings | None, base: Path, server: FakeServer, tmp_path: Path
) -> None:
    server.refuses_loads = True
    reason = "status 404" if lora else "status 500 .*no such layer"
    with pytest.raises(RolloutError, match=rf"{reason}.*VLLM_ALLOW_RUNTIME_LORA_UPDATING.*VLLM_SERVER_DEV_MODE=1"):
        pushed(server, tmp_path, loaded(base, lora))


# ---------------------------------------------------------------------- faults
FAULTS = {
    "overloaded": [Fault("status", 503), Fault("status", 502), Fault("status", 408)],
    "cut": [Fault("drop"), Fault("drop")],
    "garbage": [Fault("garbage"), Fault("garbage")],
    "error": [Fault("status", 500)],
    "abort": [Fault("abort")] * 4,
    "late": [Fault("hang")],
}


@pytest.mark.parametrize("dialect", ["openai", "vllm", "sglang"])
@pytest.mark.parametrize("faults", FAULTS.values(), ids=FAULTS)
def test_a_fault_changes_no_answer(dialect: str, faults: list[Fault], base: Path, server: FakeServer, tmp_path: Path) -> None:
    answering = loaded(base, LORA)
    made = pushed(server, tmp_path, answering, dialect=dialect, timeout_s=2.0 if faults[0].kind == "hang" else 9.0)
    server.faults = iter(faults)
    assert_same(made.generate(requests(answering)[:2], SHORT), in_process(answering, requests(answering)[:2]))
    assert made.connection.retries == len(faults)


def test_retry_after_is_waited_for(base: Path, server: FakeServer, tmp_path: Path) -> None:
    answering = loaded(base, LORA)
    made = pushed(server, tmp_path, answering)
    server.faults = iter([Fault("status", 429, retry_after="1")])
    began = time.monotonic()
    made.generate(requests(answering)[:1], SHORT)
    assert time.monotonic() - began >= 1


LASTING = 99
GIVEN_UP = {
    "deadline": ([Fault("status", 503)] * LASTING, r"status 503 .*tries in \d.* s, engine.deadline_s=1\)"),
    "timeout": ([Fault("hang")] * LASTING, r"no answer in \S+ s \(see engine.timeout_s\)"),
    "garbage": ([Fault("garbage")] * 3, r"no `choices` .*502 but says 200.*\(3 tries in"),
    "errors": ([Fault("status", 500)] * 2, r"status 500 .*\(2 tries in"),
    "refused": ([Fault("status", 400)], r"status 400 .*injected.*\(1 try in"),
    "nan": ([Fault("nan")], r"the log-probability of token \d is nan: the weights hold NaN"),
}


@pytest.mark.parametrize(("faults", "message"), GIVEN_UP.values(), ids=GIVEN_UP)
def test_what_does_not_pass_is_an_error(faults: list[Fault], message: str, base: Path, server: FakeServer, tmp_path: Path) -> None:
    answering = loaded(base, LORA)
    lasting = {"timeout_s": 0.4, "deadline_s": 1.0} if len(faults) == LASTING else {}
    made = pushed(server, tmp_path, answering, **lasting)
    server.faults = iter(faults)
    with pytest.raises(RolloutError, match=message):
        made.generate(requests(answering)[:1], SHORT)


def test_each_try_asks_the_next_server_and_siblings_ask_the_same(base: Path, server: FakeServer, tmp_path: Path) -> None:
    answering = loaded(base, LORA)
    with FakeServer(base) as second:
        made = HTTPEngine([server.url, second.url], str(tmp_path / "sync"), deadline_s=10.0)
        made.setup(answering, rank=0, world_size=1)
        made.update_weights(0)
        assert server.adapters == second.adapters, "all servers take the weights"
        expected = in_process(answering, requests(answering))
        assert_same(made.generate(requests(answering), SHORT), expected)
        assert sorted([len(server.asked), len(second.asked)]) == [3, 6], "three siblings of each of three prompts"
        second.stop()
        assert_same(made.generate(requests(answering), SHORT), expected)


# ---------------------------------------------------------------------- the start
def test_the_start_waits_for_the_server_and_knows_its_models(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answering = loaded(base, LORA)
    monkeypatch.setenv("ROLLOUT_TOKEN", "secret")
    server = FakeServer(base, token="secret")
    with pytest.raises(RolloutError, match=r"is not ready after engine.health_s=0.1 s: GET /health gives .*engine.urls"):
        pushed(server, tmp_path, answering, health_s=0.1)
    server.health = [503, 503]
    with server:
        assert pushed(server, tmp_path, answering).base == BASE
        with pytest.raises(ConfigError, match=r"engine.model='other' is not served at .*, which has miniature.*name one"):
            pushed(server, tmp_path, answering, model="other")
        monkeypatch.delenv("ROLLOUT_TOKEN")
        with pytest.raises(RolloutError, match="status 401"):
            pushed(server, tmp_path, answering)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 0}, "engine.keep=0"),
        ({"dialect": "grpc"}, "openai, vllm, sglang"),
        ({"urls": []}, "urls is empty"),
        ({"urls": "not a url"}, "host:port"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HTTPEngine(**{"urls": "localhost:8000", "sync_dir": "sync"} | settings)


def test_a_probe_of_one_token_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="engine.probe='7' is 1 tokens"):
        HTTPEngine("localhost:8000", str(tmp_path), probe="7").setup(loaded(base, None), rank=0, world_size=1)
