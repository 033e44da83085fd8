"""What an answer of vLLM's own route must tell, and whose log-probabilities they may be."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from fake_server import FakeServer
from test_http import LORA, assert_same, in_process, loaded, pushed, requests

from lit_rl.rollouts.base import RolloutError, Sampling
from lit_rl.rollouts.connection import Forgotten
from lit_rl.rollouts.dialects import Unreadable, Unusable
from lit_rl.rollouts.http import HTTPEngine
from lit_rl.rollouts.vllm import Generate

ANSWER: dict[str, Any] = {
    "model": "first",
    "choices": [
        {
            "finish_reason": "stop",
            "token_ids": [5, 1],
            "weight_versions": [{"version": "v3", "start": 0, "end": 1}, {"version": "v4", "start": 1, "end": 2}],
            "logprobs": {"content": [{"token_id": 5, "logprob": -0.5}, {"token_id": 1, "logprob": -0.25}]},
        }
    ],
}


def with_choice(**changed: Any) -> dict[str, Any]:
    body = copy.deepcopy(ANSWER)
    body["choices"][0] |= changed
    return body


def test_an_answer_is_read() -> None:
    read = Generate().read(ANSWER)
    assert (read.ids, read.logprobs, read.finish, read.model, read.versions) == ([5, 1], [-0.5, -0.25], "stop", "first", ["v3", "v4"])


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"weight_versions": None}, Unusable, "does not tell which weights .* set engine.dialect to openai"),
        ({"weight_versions": [{}]}, Unusable, "does not tell which weights"),
        ({"token_ids": None}, Unreadable, "no `token_ids`"),
        ({"token_ids": [5, 2]}, Unreadable, "of other tokens than it answers with"),
        ({"logprobs": None}, Unreadable, "no log-probabilities"),
        ({"finish_reason": "error"}, Unreadable, "ends for the reason 'error'"),
        ({"token_ids": [], "logprobs": {"content": []}}, Unreadable, "no token"),
    ],
)
def test_an_answer_that_lacks_something_is_none(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Generate().read(with_choice(**changed))


def test_an_aborted_answer_needs_no_tokens() -> None:
    content = {"content": []}
    assert Generate().read(with_choice(finish_reason="abort", token_ids=[], weight_versions=[], logprobs=content)).finish == "abort"


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
def test_tokens_of_other_whole_weights_are_asked_for_anew_and_end_the_run_at_last(
    lora: Any, base: Path, server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Something else loads weights into the server while it answers. An adapter's answers do not depend on that name."""
    policy = loaded(base, lora, shift=0.05)
    made = pushed(server, tmp_path, policy, dialect="vllm")
    expected = in_process(policy, requests(policy))
    monkeypatch.setattr(server, "spans", lambda count: [(server.weights_version, 0, 1), ("theirs", 1, count)])
    if lora:
        assert_same(made.generate(requests(policy), Sampling(max_new_tokens=6)), expected)
        return
    with pytest.warns(UserWarning, match="has lost the weights"), pytest.raises(Forgotten, match="'theirs' answered where 'policy-v0-"):
        made.generate(requests(policy), Sampling(max_new_tokens=6))
    assert len(server.loads) == 3


SHAPES = [{"top_p": 0.6}, {"top_k": 3}, {"top_p": 0.8, "top_k": 4}]


@pytest.mark.parametrize("dialect", ["openai", "vllm"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_raw_log_probabilities_are_right_with_top_p_and_top_k_at_temperature_1(
    shape: dict[str, Any], dialect: str, base: Path, tmp_path: Path
) -> None:
    """They are of the whole distribution, as a trainer computes them: those of the processed one are found out."""
    policy, sampling = loaded(base, LORA, shift=0.05), Sampling(max_new_tokens=6, **shape)
    with FakeServer(base, raw=True) as server:
        found = pushed(server, tmp_path / "raw", policy, dialect=dialect).generate(requests(policy), sampling)
        assert_same(found, in_process(policy, requests(policy), sampling))
        assert {body.get("top_p", body.get("sampling_params", {}).get("top_p")) for body in server.asked} == {sampling.top_p}
    with FakeServer(base, processed=True) as server:
        made: HTTPEngine = pushed(server, tmp_path / "processed", policy, dialect=dialect)
        with pytest.raises(RolloutError, match=r"with sampling.top_p or top_k draw at temperature 1 and use raw_logprobs"):
            made.generate(requests(policy), sampling)
