"""The engine of our own: the same answers as transformers' `generate`, whatever it does to be faster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rough_lm import farthest, policy_of, ready, recomputed, requests, roughen
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from lit_rl.errors import ConfigError
from lit_rl.miniatures.lm import Family
from lit_rl.policies.weights.lora import LoraSettings
from lit_rl.rollouts import room
from lit_rl.rollouts.base import Request, Sample, Sampling
from lit_rl.rollouts.cache import Cache
from lit_rl.rollouts.decoder import Decoder, unsupported
from lit_rl.rollouts.hf import HFEngine
from lit_rl.rollouts.native import NativeEngine

KNOWN: list[Family] = ["qwen2", "qwen3", "llama"]
SAMPLINGS = [
    Sampling(max_new_tokens=20),
    Sampling(max_new_tokens=20, temperature=0.7, top_p=0.9),
    Sampling(max_new_tokens=20, temperature=1.3, top_k=5),
    Sampling(max_new_tokens=20, temperature=0.0),
]


def assert_same(ours: list[Sample], theirs: list[Sample], tolerance: float = 1e-4) -> None:
    assert [answer.ids for answer in ours] == [answer.ids for answer in theirs]
    assert [answer.finish for answer in ours] == [answer.finish for answer in theirs]
    assert max(farthest(a.logprobs, b.logprobs) for a, b in zip(ours, theirs)) < tolerance


@pytest.fixture(params=[0, 1 << 60], ids=["shared", "apart"])
def sharing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether siblings share their prompt's keys and values; both ways give the same answers."""
    monkeypatch.setattr(room, "WORTH_SHARING", {"cpu": request.param, "cuda": request.param})
    return not request.param


@pytest.mark.usefixtures("sharing")
@pytest.mark.parametrize("family", KNOWN)
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["plain", "top-p", "top-k", "greedy"])
def test_answers_are_those_of_generate(family: Family, sampling: Sampling, tmp_path: Path) -> None:
    """15 requests through 4 rows: prompts of four lengths, answers that end anywhere, siblings that do not fit in together."""
    policy = policy_of(tmp_path, family)
    for seed in range(3):
        asked = requests(policy, seed=seed)
        assert_same(ready(NativeEngine(batch=4), policy).generate(asked, sampling), ready(HFEngine(), policy).generate(asked, sampling))


@pytest.mark.parametrize("family", KNOWN)
def test_log_probabilities_are_those_of_the_trainer(family: Family, tmp_path: Path) -> None:
    policy = policy_of(tmp_path, family)
    asked = requests(policy)
    for sampling in SAMPLINGS[:3]:
        for request, answer in zip(asked, ready(NativeEngine(), policy).generate(asked, sampling)):
            assert farthest(answer.logprobs, recomputed(policy, request, answer, sampling.temperature)) < 1e-4


@pytest.mark.usefixtures("sharing")
def test_an_answer_depends_on_its_key_and_on_nothing_it_was_batched_with(tmp_path: Path) -> None:
    policy = policy_of(tmp_path)
    asked, sampling = requests(policy, group=5), SAMPLINGS[1]
    together = ready(NativeEngine(), policy).generate(asked, sampling)
    for batch in (1, 3, 8):
        assert_same(ready(NativeEngine(batch), policy).generate(asked[::-1], sampling)[::-1], together, 1e-5)
    assert_same(ready(NativeEngine(), policy).generate(asked[7:8], sampling), together[7:8], 1e-5)
    assert [answer.ids for answer in ready(NativeEngine(), policy).generate(requests(policy, 5, seed=1), sampling)] != [
        answer.ids for answer in together
    ]


@pytest.mark.usefixtures("sharing")
def test_long_answers_outgrow_the_first_block_of_the_cache(tmp_path: Path) -> None:
    policy = policy_of(tmp_path)
    policy.stop_ids = [10_000]  # type: ignore[misc]  # no token at all
    asked, sampling = requests(policy, group=1), Sampling(max_new_tokens=200)
    ours = ready(NativeEngine(batch=2), policy).generate(asked, sampling)
    assert {len(answer.ids) for answer in ours} == {200}
    assert_same(ours, ready(HFEngine(), policy).generate(asked, sampling))


def test_the_weights_are_those_of_now(tmp_path: Path) -> None:
    """A step of the optimizer between two calls, and no call in between that would say so."""
    policy = policy_of(tmp_path)
    engine, asked = ready(NativeEngine(), policy), requests(policy)
    before = engine.generate(asked, SAMPLINGS[0])
    with torch.no_grad():
        for parameter in policy.network.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    after = engine.generate(asked, SAMPLINGS[0])
    assert [answer.ids for answer in after] != [answer.ids for answer in before]
    assert_same(after, ready(HFEngine(), policy).generate(asked, SAMPLINGS[0]))


@pytest.mark.usefixtures("sharing")
def test_adapters_answer_as_they_are_switched(tmp_path: Path) -> None:
    policy = policy_of(tmp_path, "qwen3", lora=LoraSettings(rank=3, alpha=5.0))
    engine, asked = ready(NativeEngine(batch=4), policy), requests(policy)
    trained = engine.generate(asked, SAMPLINGS[0])
    assert_same(trained, ready(HFEngine(), policy).generate(asked, SAMPLINGS[0]))
    with policy.reference():
        base = engine.generate(asked, SAMPLINGS[0])
        assert_same(base, ready(HFEngine(), policy).generate(asked, SAMPLINGS[0]))
    assert [answer.ids for answer in base] != [answer.ids for answer in trained]


def test_an_adapter_too_small_for_bfloat16_weights_is_not_rounded_away(tmp_path: Path) -> None:
    """B A of a ten-thousandth of the weights changes log-probabilities, by what it changes them in the trainer."""
    policy = policy_of(tmp_path, lora=LoraSettings(rank=4, alpha=4.0), dtype="bfloat16")
    lm: Any = policy.network.lm
    parts = [lm.model.layers[0].self_attn.q_proj, lm.model.layers[1].mlp.down_proj]
    decoder = Decoder(lm)
    for joined, part in zip((decoder.blocks[0].qkv, decoder.blocks[1].down), parts):
        assert torch.equal(joined.weight.t()[: len(part.weight)].sort(0).values, part.base_layer.weight.sort(0).values)
        assert joined.low_rank is not None
    asked = requests(policy)
    answers = ready(NativeEngine(), policy).generate(asked, SAMPLINGS[0])
    with_adapter = [farthest(a.logprobs, recomputed(policy, r, a, 1.0)) for r, a in zip(asked, answers)]
    with policy.reference():
        without = [farthest(a.logprobs, recomputed(policy, r, a, 1.0)) for r, a in zip(asked, answers)]
    assert sum(with_adapter) / len(asked) < 0.2 < 1 < sum(without) / len(asked)


@pytest.mark.usefixtures("sharing")
@pytest.mark.parametrize("family", KNOWN)
def test_under_autocast_log_probabilities_are_the_trainers_to_its_precision(family: Family, tmp_path: Path) -> None:
    policy = policy_of(tmp_path, family)
    asked = requests(policy)
    with torch.autocast("cpu", torch.bfloat16):
        answers = ready(NativeEngine(), policy).generate(asked, SAMPLINGS[0])
        apart = torch.tensor([abs(x - y) for r, a in zip(asked, answers) for x, y in zip(a.logprobs, recomputed(policy, r, a, 1.0))])
    exact = torch.tensor([abs(x - y) for r, a in zip(asked, answers) for x, y in zip(a.logprobs, recomputed(policy, r, a, 1.0))])
    assert 1e-4 < apart.mean() < 1.1 * exact.mean()


LLAMA = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "eos_token_id": 1}
VARIANTS: dict[str, dict[str, Any]] = {
    "one key head": {"num_key_value_heads": 1},
    "a key head for each": {"num_key_value_heads": 4},
    "biases everywhere": {"attention_bias": True, "mlp_bias": True},
    "heads wider than the model": {"head_dim": 24},
    "tied": {"tie_word_embeddings": True},
    "llama 3": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "yarn": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}},
}  # fmt: skip


class Bare:
    """A policy for an engine: a language model and no more."""

    def __init__(self, lm: Any) -> None:
        self.network, self.device = torch.nn.ModuleDict({"lm": lm}), torch.device("cpu")
        self.stop_ids, self.banned_ids = [1, 2, 3], []
        self.network.lm = lm

    def generation_inputs(self, ids: torch.Tensor, media: Any) -> dict[str, torch.Tensor]:
        return {}


def bare(lm: Any) -> Any:
    roughen(lm.eval())
    return Bare(lm)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_the_architecture(variant: str) -> None:
    torch.manual_seed(0)
    policy = bare(LlamaForCausalLM(LlamaConfig(**LLAMA | VARIANTS[variant])))  # type: ignore[arg-type]
    asked = [Request(list(range(4, 4 + 5 * n)), (i,)) for i, n in enumerate([1, 1, 4, 2])]
    assert unsupported(policy.network.lm) is None
    ours = ready(NativeEngine(), policy).generate(asked, Sampling(max_new_tokens=40))
    assert_same(ours, ready(HFEngine(), policy).generate(asked, Sampling(max_new_tokens=40)))


def test_models_it_does_not_know_are_answered_for_by_generate(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    policy = policy_of(tmp_path, "deepseek")
    with caplog.at_level("INFO"):
        engine = ready(NativeEngine(), policy)
    assert "DeepseekV3ForCausalLM" in caplog.text and "HFEngine" in caplog.text
    asked = requests(policy)
    assert_same(engine.generate(asked, SAMPLINGS[1]), ready(HFEngine(), policy).generate(asked, SAMPLINGS[1]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, "sliding"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
    ],
)
def test_what_it_cannot_compute_is_named(change: dict[str, Any], said: str) -> None:
    reason = unsupported(Qwen2ForCausalLM(Qwen2Config(**LLAMA | change)))  # type: ignore[arg-type]
    assert reason is not None and said in reason


def test_other_adapters_and_subclasses_are_not_taken_for_what_they_resemble() -> None:
    from peft import LoraConfig

    class Mine(LlamaForCausalLM):
        pass

    assert "Mine" in str(unsupported(Mine(LlamaConfig(**LLAMA))))  # type: ignore[arg-type]
    lm = LlamaForCausalLM(LlamaConfig(**LLAMA))  # type: ignore[arg-type]
    lm.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    assert "q_proj has an adapter other than LoRA" in str(unsupported(lm))


@pytest.mark.usefixtures("sharing")
def test_a_prompt_is_read_once_for_all_who_ask_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for siblings who find no room at first; and what one group has asked another finds."""
    policy, read = policy_of(tmp_path), []
    original = Decoder.prefill

    def counted(self: Decoder, prompts: Any, *rest: Any) -> Any:
        read.extend(tuple(prompt) for prompt in prompts)
        return original(self, prompts, *rest)

    monkeypatch.setattr(Decoder, "prefill", counted)
    asked = requests(policy, group=7)
    ready(NativeEngine(batch=3), policy).generate(asked, SAMPLINGS[0])
    assert sorted(read) == sorted({tuple(request.prompt) for request in asked})


def rows_of_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """It gets the number of rows of each step of the decoder."""
    steps: list[int] = []
    original = Decoder.step

    def counted(self: Decoder, tokens: Any, *rest: Any, **options: Any) -> Any:
        steps.append(len(tokens))
        return original(self, tokens, *rest, **options)

    monkeypatch.setattr(Decoder, "step", counted)
    return steps


def test_rows_stay_busy_while_somebody_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that has ended leaves its row to the next request: far fewer steps than batch after batch would take."""
    policy, steps = policy_of(tmp_path), rows_of_steps(monkeypatch)
    answers = ready(NativeEngine(batch=4), policy).generate(requests(policy, group=8), Sampling(max_new_tokens=60))
    assert sum(steps) == sum(len(answer.ids) - 1 for answer in answers)  # nothing is computed for who has ended
    lengths = [len(answer.ids) for answer in answers]
    assert len(steps) < 0.8 * sum(max(lengths[i : i + 4]) for i in range(0, len(lengths), 4))


def test_memory_bounds_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sharing: bool) -> None:
    policy, caches = policy_of(tmp_path), []
    original = Decoder.cache

    def watched(self: Decoder, **sizes: int) -> Cache:
        caches.append(original(self, **sizes))
        return caches[-1]

    monkeypatch.setattr(Decoder, "cache", watched)
    asked, sampling = requests(policy), Sampling(max_new_tokens=20)
    longest = max(len(request.prompt) for request in asked)
    bound = ready(NativeEngine(max_batch_tokens=3 * (longest + 20) + 5), policy)
    assert_same(bound.generate(asked, sampling), ready(NativeEngine(), policy).generate(asked, sampling), 1e-5)
    assert [cache.own.shape[2] for cache in caches] == [3, len(asked)]
    assert {cache.own.shape[4] for cache in caches} == {19 if sharing else longest + 19}
    assert [cache.prompts.shape[2] for cache in caches] == ([4, 4] if sharing else [0, 0])
    ready(NativeEngine(max_batch_tokens=1), policy).generate(asked, sampling)
    assert caches[-1].own.shape[2] == 1


def test_the_cache_is_never_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sharing: bool) -> None:
    """Answers that grow write into memory that they had from the start."""
    policy, places = policy_of(tmp_path), set()
    policy.stop_ids = [10_000]  # type: ignore[misc]  # no token at all
    original = Cache.reserve

    def watched(self: Cache, columns: int) -> None:
        original(self, columns)
        places.add(self.own.data_ptr())

    monkeypatch.setattr(Cache, "reserve", watched)
    ready(NativeEngine(), policy).generate(requests(policy, group=2), Sampling(max_new_tokens=150))
    assert len(places) == 1


def test_chunks_are_answered_together_and_handed_out_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that end are filled by the next chunk's; the first chunk is there before the last one has ended."""
    policy, steps = policy_of(tmp_path), rows_of_steps(monkeypatch)
    asked, engine = requests(policy, group=4), ready(NativeEngine(batch=8), policy)
    chunks, found, ends = [asked[:5], [], asked[5:12], asked[12:]], [], []
    for _, samples in engine.stream(chunks, SAMPLINGS[0]):
        assert torch.is_grad_enabled()
        found.append(samples)
        ends.append(len(steps))
    assert [len(samples) for samples in found] == [5, 0, 7, len(asked) - 12]
    assert ends == sorted(ends) and ends[0] < ends[-1]
    together = len(steps)
    assert_same([sample for samples in found for sample in samples], engine.generate(asked, SAMPLINGS[0]), 1e-5)
    steps.clear()
    for chunk in chunks[:1] + chunks[2:]:
        engine.generate(chunk, SAMPLINGS[0])
    assert together < len(steps)
    assert list(engine.stream([], SAMPLINGS[0])) == [] and list(engine.stream([[], []], SAMPLINGS[0])) == [(0, []), (1, [])]


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    engine = ready(NativeEngine(), policy_of(tmp_path))
    assert engine.generate([], SAMPLINGS[0]) == []
    with pytest.raises(ConfigError, match="no token"):
        engine.generate([Request([], (0,))], SAMPLINGS[0])
    with pytest.raises(ConfigError, match=r"engine\.batch=0"):
        NativeEngine(batch=0)


def test_the_folder_it_was_loaded_from_answers_the_same(tmp_path: Path) -> None:
    """Nothing of the engine stays in the model that is saved."""
    policy = policy_of(tmp_path / "a")
    ready(NativeEngine(), policy).generate(requests(policy), SAMPLINGS[0])
    policy.network.lm.save_pretrained(tmp_path / "b")  # type: ignore[operator, union-attr]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert all(torch.equal(a, b) for a, b in zip(policy.network.lm.parameters(), again.parameters()))  # type: ignore[union-attr]
