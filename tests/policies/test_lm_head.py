"""Log-probabilities are those of the model's own logits, whatever its forward does to them after the output layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from lit_rl.losses import token_logprobs
from lit_rl.policies import lm_head
from lit_rl.policies.language_model import TokenNetwork
from lit_rl.policies.lm_head import LMHead, recognized

SIZES: dict[str, Any] = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.3,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
BERT = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"} | {"is_decoder": True}
INKLING: dict[str, Any] = dict(
    unpadded_vocab_size=50, logits_mup_width_multiplier=2.0, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
    head_dim=8, swa_head_dim=8, swa_num_attention_heads=4, swa_num_key_value_heads=2,
)  # fmt: skip
T = transformers
MODELS: dict[str, tuple[Callable[[], Any], LMHead]] = {
    "granite": (lambda: T.GraniteForCausalLM(T.GraniteConfig(**SIZES, logits_scaling=8.0)), LMHead(scale=1 / 8)),
    "hyperclovax": (lambda: T.HyperCLOVAXForCausalLM(T.HyperCLOVAXConfig(**SIZES, logits_scaling=0.3)), LMHead(scale=0.3)),
    "cohere": (lambda: T.CohereForCausalLM(T.CohereConfig(**SIZES, logit_scale=0.0625)), LMHead(scale=0.0625)),
    "gemma2": (lambda: T.Gemma2ForCausalLM(T.Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=3.0)), LMHead(softcap=3.0)),
    "gemma2 uncapped": (lambda: T.Gemma2ForCausalLM(T.Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=None)), LMHead()),
    "phi, a bias": (lambda: T.PhiForCausalLM(T.PhiConfig(**SIZES)), LMHead()),
    "opt, projected": (
        lambda: T.OPTForCausalLM(
            T.OPTConfig(vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=16)
        ),
        LMHead(),
    ),
    "llama4, a body of another name": (
        lambda: T.Llama4ForCausalLM(
            T.Llama4TextConfig(**SIZES, head_dim=8, num_local_experts=2, intermediate_size_mlp=48, attention_chunk_size=16)
        ),
        LMHead(),
    ),
    "inkling, words that are left out": (
        lambda: T.InklingForCausalLM(T.InklingTextConfig(**SIZES | INKLING)),
        LMHead("own"),
    ),
    "bert, layers before the last": (lambda: T.BertLMHeadModel(T.BertConfig(**BERT)), LMHead("own")),
    "of the house": (lambda: Odd(T.LlamaConfig(**SIZES)), LMHead("own")),
}


class Odd(transformers.LlamaForCausalLM):
    """A family that nobody knows: it bends each logit by a power and forbids a word."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = (out.logits.sign() * out.logits.abs() ** 0.7).index_fill(-1, torch.tensor([7]), -torch.inf)
        return out


def made(name: str) -> tuple[Any, LMHead]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        build, expected = MODELS[name]
        lm = build().eval()
        with torch.no_grad():
            for parameter in lm.parameters():
                parameter += 0.1 * torch.randn(parameter.shape) * (parameter.ndim == 1)
    return lm, expected


def batch() -> tuple[Tensor, Tensor, Tensor]:
    tokens = torch.randint(8, 50, (2, 9), generator=torch.Generator().manual_seed(1))
    places = torch.tensor([0, 2, 7, 9, 13, 16])
    return tokens, places, tokens.flatten()[places + 1]


def by_hand(lm: Any, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    tokens, places, targets = batch()
    logp = (lm(input_ids=tokens).logits.flatten(0, 1)[places] / temperature).log_softmax(-1)
    return logp.gather(-1, targets[:, None])[:, 0], torch.special.entr(logp.exp()).sum(-1)


@pytest.mark.parametrize("name", MODELS)
def test_logprobs_and_gradients_are_those_of_the_models_own_forward(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, expected = made(name)
    head = recognized(lm)
    assert head == expected
    for elements in (2**22, 128):  # all at once, and two tokens at a time
        monkeypatch.setitem(token_logprobs.CHUNK_ELEMENTS, "cpu", elements)
        results = []
        for found in (by_hand(lm, 0.7), TokenNetwork(lm, head)(*batch(), positions=None, temperature=0.7, entropy=True)):
            lm.zero_grad()
            if name == "of the house":  # a forbidden word has no entropy whose gradient autograd could tell
                found[0].sum().backward()
            else:
                (found[0].sum() + found[1].sum()).backward()
            results.append((*found, *(p.grad.clone() for p in lm.parameters() if p.grad is not None)))
        assert len(results[0]) == len(results[1]) > 5
        for mine, theirs in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("kind", ["affine", "own", "whole"])
def test_tokens_may_have_temperatures_of_their_own(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, head = made("granite")
    temperature = torch.linspace(0.5, 1.5, 6)
    expected = by_hand(lm, temperature[:, None])
    for elements in (2**22, 128):  # all at once, and two tokens at a time
        monkeypatch.setitem(token_logprobs.CHUNK_ELEMENTS, "cpu", elements)
        asked = TokenNetwork(lm, LMHead(kind, head.scale))
        torch.testing.assert_close(asked(*batch(), positions=None, temperature=temperature, entropy=True), expected, rtol=1e-5, atol=1e-5)


def test_a_head_is_found_without_a_draw_and_leaves_the_model_as_it_was() -> None:
    lm, _ = made("granite")
    state, names = torch.get_rng_state(), [name for name, _ in lm.named_modules()]
    recognized(lm)
    assert torch.equal(state, torch.get_rng_state()) and names == [name for name, _ in lm.named_modules()]
    assert lm_head.body(lm) is lm.model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["granite", "cohere", "gemma2", "phi, a bias", "inkling, words that are left out"])
def test_a_head_is_found_in_16_bits(name: str, dtype: torch.dtype) -> None:
    lm, expected = made(name)
    assert recognized(lm.to(dtype)) == expected


def test_a_model_whose_body_is_not_told_apart_is_asked_whole() -> None:
    lm, _ = made("granite")
    new, entropy = TokenNetwork(lm, LMHead("whole"))(*batch(), positions=None, temperature=0.7, entropy=True)
    torch.testing.assert_close((new, entropy), by_hand(lm, 0.7))
