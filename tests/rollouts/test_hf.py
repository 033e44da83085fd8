"""The engine around transformers' own `generate`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from rough_lm import farthest, policy_of, ready, recomputed, requests

from lit_rl.miniatures.lm import Family
from lit_rl.rollouts import hf
from lit_rl.rollouts.base import Request, Sampling
from lit_rl.rollouts.hf import HFEngine
from lit_rl.rollouts.native import NativeEngine
from lit_rl.rollouts.room import need_of


@pytest.mark.parametrize("family", get_args(Family))
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_answers_are_whole_and_have_the_log_probabilities_of_the_trainer(family: Family, temperature: float, tmp_path: Path) -> None:
    policy = policy_of(tmp_path, family)
    asked = requests(policy)
    answers = ready(HFEngine(batch=5), policy).generate(asked, Sampling(max_new_tokens=12, temperature=temperature))
    assert {answer.finish for answer in answers} == {"stop", "length"}
    for request, answer in zip(asked, answers):
        assert farthest(answer.logprobs, recomputed(policy, request, answer, temperature)) < 1e-4
        assert not set(answer.ids[:-1]) & set(policy.stop_ids)
        assert (answer.ids[-1] in policy.stop_ids) if answer.finish == "stop" else len(answer.ids) == 12


def test_an_answer_depends_on_its_key_and_on_nothing_it_was_batched_with(tmp_path: Path) -> None:
    policy = policy_of(tmp_path)
    asked, sampling = requests(policy), Sampling(max_new_tokens=12, top_p=0.9)
    together = [answer.ids for answer in ready(HFEngine(batch=64), policy).generate(asked, sampling)]
    backwards = [answer.ids for answer in ready(HFEngine(batch=4), policy).generate(asked[::-1], sampling)]
    assert backwards[::-1] == together
    others = ready(HFEngine(), policy).generate(requests(policy, seed=1), sampling)
    assert [answer.ids for answer in others] != together and len({tuple(ids) for ids in together[:3]}) > 1


def test_answers_with_temperatures_of_their_own_are_those_of_a_sampling_at_each(tmp_path: Path) -> None:
    """Siblings of one prompt, at 0.4, 1.0 (the sampling's) and 2.5, through both engines; log-probabilities are the trainer's at each."""
    policy, values = policy_of(tmp_path), [0.4, None, 2.5]
    asked = [replace(request, temperature=values[i % 3]) for i, request in enumerate(requests(policy))]
    sampling = Sampling(max_new_tokens=12)
    hot = {t: ready(HFEngine(), policy).generate(asked_at(asked), Sampling(max_new_tokens=12, temperature=t)) for t in (0.4, 1.0, 2.5)}
    for engine in (HFEngine(batch=5), NativeEngine(batch=4)):
        answers = ready(engine, policy).generate(asked, sampling)
        for i, (request, answer) in enumerate(zip(asked, answers)):
            temperature = request.temperature or 1.0
            assert answer.ids == hot[temperature][i].ids
            assert farthest(answer.logprobs, recomputed(policy, request, answer, temperature)) < 1e-4


def asked_at(requests: list[Request]) -> list[Request]:
    """Without temperatures of their own."""
    return [replace(request, temperature=None) for request in requests]


def test_what_generation_config_does_to_the_distribution_is_left_out(tmp_path: Path) -> None:
    """Qwen2.5's asks for repetition_penalty 1.05: answers would not come from what is trained, nor have its log-probabilities."""
    policy = policy_of(tmp_path)
    asked, sampling = requests(policy), Sampling(max_new_tokens=12)
    plain = [answer.ids for answer in ready(HFEngine(), policy).generate(asked, sampling)]
    own = policy.network.lm.generation_config
    own.update(repetition_penalty=3.0, no_repeat_ngram_size=1, min_new_tokens=12, num_beams=2)  # type: ignore[operator, union-attr]
    answers = ready(HFEngine(), policy).generate(asked, sampling)
    assert [answer.ids for answer in answers] == plain
    assert farthest(answers[0].logprobs, recomputed(policy, asked[0], answers[0], 1.0)) < 1e-4
    assert policy.network.lm.generation_config is own  # an export writes it


def test_at_temperature_0_it_is_the_greedy_answer_of_transformers(tmp_path: Path) -> None:
    policy = policy_of(tmp_path)
    request = requests(policy)[3]
    (answer,) = ready(HFEngine(), policy).generate([request], Sampling(max_new_tokens=12, temperature=0.0))
    lm = policy.network.lm
    greedy = lm.generate(torch.tensor([request.prompt]), max_new_tokens=12, do_sample=False, eos_token_id=policy.stop_ids)  # type: ignore[operator, union-attr]
    assert greedy[0, len(request.prompt) :].tolist() == answer.ids


def test_rows_follow_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a Qwen2 of 2 layers with 2 key heads of 8 numbers in float32; a given batch stands, and pictures are bounded."""
    policy = policy_of(tmp_path, hidden=32)
    config = policy.network.lm.config
    need = need_of(config, torch.float32)
    heads, width = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    assert need.token == 2 * config.num_hidden_layers * heads * width * 4 and need.numbers == heads * width
    assert (need.reading, need_of(config, torch.bfloat16).token) == (16 * 32 * 4, need.token // 2)
    asked, sampling = requests(policy, group=4), Sampling(max_new_tokens=12)
    longest = max(len(request.prompt) for request in asked)
    row = (longest + 12) * need.token + longest * need.reading + need.logits
    monkeypatch.setattr(hf, "memory_for_answers", lambda device, processes: 5 * row + row // 2)
    engine = ready(HFEngine(), policy)
    assert [len(batch) for batch in engine.batches(asked, engine.rows(asked, sampling))] == [5, 5, 5, 5]
    assert ready(HFEngine(batch=7), policy).rows(asked, sampling) == 7
    few = [answer.ids for answer in engine.generate(asked, sampling)]
    monkeypatch.undo()
    assert engine.rows(asked, sampling) == len(asked)
    assert [answer.ids for answer in engine.generate(asked, sampling)] == few
    pictured = [replace(request, media=(torch.zeros(3, 2, 2),)) for request in asked * 2]
    assert engine.rows(pictured, sampling) == hf.WITH_PICTURES < len(pictured)
