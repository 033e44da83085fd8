"""A run begins only where training, sampler and the model's own logits agree; the look at it leaves no trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from any_lm import SIZES, save_lm
from toy_text import Digits, policy, trainer

from lit_rl.errors import ConfigError
from lit_rl.methods.dpo import DPO
from lit_rl.methods.grpo import DAPO, GRPO
from lit_rl.methods.ppo import PPO
from lit_rl.methods.sft import SFT
from lit_rl.policies.causal_lm import CausalLM
from lit_rl.policies.weights.lora import LoraSettings
from lit_rl.rollouts.answers import Answers
from lit_rl.rollouts.base import Request, Sampling
from lit_rl.rollouts.hf import HFEngine
from lit_rl.rollouts.native import NativeEngine
from lit_rl.rollouts.start_check import check_logprobs, check_sampler

HYBRID = dict(full_attention_interval=2, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16, head_dim=8)
APART: dict[str, dict[str, Any]] = {  # they know where a sequence in a row begins
    "Granite": dict(logits_scaling=8.0),
    "Gemma2": dict(head_dim=8, sliding_window=4, final_logit_softcapping=5.0),
    "Mistral": dict(sliding_window=4, head_dim=8),
    "GPT2": dict(causal="GPT2LMHeadModel"),
    "Cohere2": dict(sliding_window=4, logit_scale=0.25),
}
MINGLED: dict[str, dict[str, Any]] = {  # they do not
    "Qwen3Next": HYBRID | EXPERTS,
    "Mamba": dict(state_size=8),
    "Rwkv": dict(attention_hidden_size=32, context_length=64),
    "Bloom": {},
    "Mpt": dict(d_model=32, n_heads=4, n_layers=2, max_seq_len=64),
    "OPT": dict(ffn_dim=48, word_embed_proj_dim=32),
    "Jamba": dict(num_experts=2, attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False, mamba_d_state=8),
}


def loaded(folder: Path, **settings: Any) -> CausalLM:
    made = policy(folder, **settings)
    made.load()
    return made


@pytest.mark.parametrize("family", APART)
def test_rows_side_by_side_are_accepted_where_the_model_tells_them_apart(family: str, tmp_path: Path) -> None:
    lora = None if family == "GPT2" else LoraSettings(rank=2)
    made = loaded(save_lm(tmp_path, family, **APART[family]), padding_free=True, lora=lora)
    check_logprobs(made, world_size=1)
    with pytest.raises(ConfigError, match="Penalized"):  # the check has seen the logits of this family
        check_logprobs(penalized(made), world_size=1)


@pytest.mark.parametrize("family", ["Qwen3Next", "Bloom", "Jamba"])
def test_rows_side_by_side_are_refused_with_weights_that_are_still_small(family: str, tmp_path: Path) -> None:
    folder = save_lm(tmp_path, family, **MINGLED[family] | {"initializer_range": 0.02})
    with pytest.raises(ConfigError, match=r"(?s)words of one sequence.*set model.policy.padding_free to false"):
        check_logprobs(loaded(folder, padding_free=True), world_size=1)


@pytest.mark.parametrize("family", MINGLED)
def test_rows_side_by_side_are_refused_where_it_does_not(family: str, tmp_path: Path) -> None:
    folder = save_lm(tmp_path, family, **{"initializer_range": 0.5} | MINGLED[family])
    check_logprobs(loaded(folder), world_size=1)
    with pytest.raises(ConfigError, match=r"(?s)own logits.*padding_free=true.*set model.policy.padding_free to false"):
        check_logprobs(loaded(folder, padding_free=True), world_size=1)


def penalized(made: CausalLM) -> CausalLM:
    """A family that nobody knows: words that were read become less likely."""
    lm: Any = made.network.lm
    base = type(lm)

    class Penalized(base):  # type: ignore[misc, valid-type]
        def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
            out = super().forward(input_ids=input_ids, **kwargs)
            seen = torch.nn.functional.one_hot(input_ids, out.logits.shape[-1]).cumsum(1) > 0
            out.logits = out.logits - 2.0 * seen
            return out

    lm.__class__ = Penalized
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_lm(tmp_path_factory.mktemp("llama"), "Llama")


METHODS: dict[str, Any] = {
    "sft": lambda p: SFT(p, prompts_per_iteration=8),
    "dpo": lambda p: DPO(p, prompts_per_iteration=8),
    "grpo": lambda p: GRPO(p, prompts_per_iteration=8, group_size=2, answers=Answers(sampling=Sampling(max_new_tokens=5))),
    "dapo": lambda p: DAPO(p, prompts_per_iteration=8, group_size=2, answers=Answers(sampling=Sampling(max_new_tokens=5))),
    "ppo": lambda p: PPO(p, prompts_per_iteration=8, answers=Answers(sampling=Sampling(max_new_tokens=5))),
}


@pytest.mark.parametrize("method", METHODS)
def test_no_method_trains_on_other_probabilities_than_the_models(method: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = penalized(loaded(folder, lora=LoraSettings(rank=2)))
    before = {name: p.clone() for name, p in made.named_parameters()}
    with pytest.raises(ConfigError, match="Penalized: .* from those of the model's own logits.*more than each token's last hidden state"):
        trainer(max_epochs=1).fit(METHODS[method](made), datamodule=Digits(prompts=8))
    assert all(torch.equal(p, before[name]) for name, p in made.named_parameters())


def test_an_adapter_without_a_part_in_training_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = loaded(folder, lora=LoraSettings(rank=2, targets=["lm_head", "q_proj"]))
    check_logprobs(made, world_size=1)
    monkeypatch.setattr("lit_rl.policies.language_model.active_factors", lambda *_: None)
    with pytest.raises(ConfigError, match=r"an adapter has no part in one of them.*lora\.targets"):
        check_logprobs(made, world_size=1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_check_leaves_weights_modes_and_random_streams_as_they_were(dtype: str, folder: Path) -> None:
    made = loaded(folder, lora=LoraSettings(rank=2), dtype=dtype).train()
    before = {name: p.clone() for name, p in made.named_parameters()}
    modes, state = [m.training for m in made.modules()], torch.get_rng_state()
    check_logprobs(made, world_size=1)
    engine = NativeEngine()
    engine.setup(made, rank=0, world_size=1)
    check_sampler(made, engine, Sampling(max_new_tokens=3), world_size=1)
    assert torch.equal(state, torch.get_rng_state()) and modes == [m.training for m in made.modules()]
    assert all(torch.equal(p, before[name]) for name, p in made.named_parameters())


def test_a_sampler_that_reports_other_numbers_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, engine = loaded(folder), NativeEngine()
    engine.setup(made, rank=0, world_size=1)
    real = engine.generate

    def off(*args: Any) -> Any:
        samples = real(*args)
        samples[1].logprobs = [value - 0.5 for value in samples[1].logprobs]
        return samples

    monkeypatch.setattr(engine, "generate", off)
    with pytest.raises(ConfigError, match="NativeEngine samples with are 0.5 from those"):
        check_sampler(made, engine, Sampling(max_new_tokens=4), world_size=1)


@pytest.mark.parametrize("family", [*APART, *(name for name in MINGLED if name != "Jamba")])
def test_hf_samples_with_what_trains_whatever_the_family(family: str, tmp_path: Path) -> None:
    """Prompts of several lengths in one batch: positions, states and alibi begin where the prompt does."""
    made, engine = loaded(save_lm(tmp_path, family, **(APART | MINGLED)[family])), HFEngine()
    engine.setup(made, rank=0, world_size=1)
    check_sampler(made, engine, Sampling(max_new_tokens=4), world_size=1)
    assert (engine.one_length, engine.batch) == (False, 1 if family == "Rwkv" else None)
    asked = [Request(list(range(3, 3 + n)), (n,)) for n in (5, 2, 7, 2, 5)]
    together, alone = (
        engine.generate(asked, Sampling(max_new_tokens=4)),
        [engine.generate([r], Sampling(max_new_tokens=4))[0] for r in asked],
    )
    assert [s.ids for s in together] == [s.ids for s in alone]


def test_prompts_of_one_length_are_answered_together_where_padding_is_seen(tmp_path: Path) -> None:
    """A decoder whose learned positions count the padding."""
    made, engine = (
        loaded(save_lm(tmp_path, "Bart", decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48, init_std=0.3)),
        HFEngine(),
    )
    engine.setup(made, rank=0, world_size=1)
    check_sampler(made, engine, Sampling(max_new_tokens=4), world_size=1)
    assert engine.one_length and engine.batch is None


def test_a_model_of_few_positions_is_tried_within_them(tmp_path: Path) -> None:
    assert SIZES["max_position_embeddings"] > 8
    folder = save_lm(tmp_path, "GPT2", "GPT2LMHeadModel", max_position_embeddings=8)
    made, engine = loaded(folder, padding_free=True), HFEngine()
    check_logprobs(made, world_size=1)
    engine.setup(made, rank=0, world_size=1)
    check_sampler(made, engine, Sampling(max_new_tokens=4), world_size=1)
