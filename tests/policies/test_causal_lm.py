"""A language model from transformers: log-probabilities, LoRA and reference, what it saves, what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import transformers
from peft import PeftModel
from torch import Tensor

from lit_rl.errors import ConfigError
from lit_rl.miniatures.lm import Family, build_lm
from lit_rl.policies.causal_lm import CausalLM
from lit_rl.policies.weights.lora import LoraSettings

Make = Callable[..., CausalLM]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("lms")
    return {family: build_lm(root / family, family=family, hidden=32) for family in get_args(Family)}


@pytest.fixture
def make(folders: dict[str, Path]) -> Make:
    def made(family: Family = "qwen2", **settings: Any) -> CausalLM:
        torch.manual_seed(0)
        policy = CausalLM(str(folders[family]), **settings)
        policy.load()
        return policy.eval()

    return made


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Four sequences of 4 to 9 tokens; of each some tokens are chosen, with holes. Padding is a number that is no token."""
    g = torch.Generator().manual_seed(1)
    lengths = torch.tensor([9, 4, 7, 5])
    tokens = torch.randint(5, 100, (4, 9), generator=g).where(torch.arange(9) < lengths[:, None], 10**6)
    mask = (torch.rand(4, 8, generator=g) < 0.6) & (torch.arange(8) < (lengths - 1)[:, None])
    return tokens, lengths, mask


@torch.no_grad()
def plain(model: Any, tokens: Tensor, lengths: Tensor, mask: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies, one sequence at a time through the stock forward."""
    new, entropy = torch.zeros(mask.shape), torch.zeros(mask.shape)
    for i, n in enumerate(lengths.tolist()):
        logits = model(tokens[i : i + 1, :n]).logits[0].float() / temperature
        logp = logits.log_softmax(-1)
        new[i, : n - 1] = logp[:-1].gather(-1, tokens[i, 1:n, None])[:, 0]
        entropy[i, : n - 1] = -(logp.exp() * logp).sum(-1)[:-1]
    return new * mask, entropy * mask


@pytest.mark.parametrize("family", get_args(Family))
@pytest.mark.parametrize("padding_free", [False, True])
def test_logprobs_are_those_of_each_sequence_alone(family: Family, padding_free: bool, make: Make) -> None:
    policy = make(family, padding_free=padding_free)
    expected = plain(policy.network.lm, *batch(), temperature=0.7)
    for found, value in zip(policy.logprobs(*batch(), temperature=0.7, entropy=True), expected, strict=True):
        assert found is not None
        torch.testing.assert_close(found, value, rtol=1e-5, atol=2e-6)


def test_gradients_do_not_depend_on_layout_and_recomputation(make: Make) -> None:
    gradients = []
    for settings in ({}, {"padding_free": True}, {"gradient_checkpointing": True}):
        policy = make(**settings).train()
        policy.logprobs(*batch())[0].sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for _, p in policy.trainable() if p.grad is not None]))
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-5, atol=1e-5)


def train(policy: CausalLM) -> None:
    for _ in range(2):
        policy.logprobs(*batch())[0].sum().backward()
        with torch.no_grad():
            for _, p in policy.trainable():
                p -= 0.01 * p.grad if p.grad is not None else 0
                p.grad = None


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=2)])
@pytest.mark.parametrize("keep", [False, True])
def test_the_reference_answers_with_the_first_weights(lora: LoraSettings | None, keep: bool, make: Make) -> None:
    policy = make(lora=lora, keep_reference=keep or lora is None)
    before = policy.logprobs(*batch())[0].detach()
    train(policy)
    after = policy.logprobs(*batch())[0].detach()
    assert (after - before).abs().max() > 1e-3
    with policy.reference():
        torch.testing.assert_close(policy.logprobs(*batch())[0].detach(), before)
    assert torch.equal(policy.logprobs(*batch())[0].detach(), after)


def test_a_kept_reference_costs_what_frozen_weights_cost(make: Make) -> None:
    policy = make(keep_reference=True, dtype="bfloat16")
    live, frozen = policy.networks()
    assert {p.dtype for p in live.parameters()} == {torch.float32} and {p.dtype for p in frozen.parameters()} == {torch.bfloat16}
    with policy.reference():
        rounded = policy.logprobs(*batch())[0]
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, policy.logprobs(*batch())[0], rtol=0, atol=0.05)
    train(policy)
    policy.refresh_reference()
    live_now = policy.logprobs(*batch())[0].detach()
    with policy.reference():
        torch.testing.assert_close(policy.logprobs(*batch())[0], live_now, rtol=0, atol=0.05)


def test_all_linear_is_the_list_of_a_language_model(make: Make) -> None:
    named, listed = make(lora=LoraSettings(targets="all-linear", rank=2)), make(lora=LoraSettings(rank=2))
    assert [name for name, _ in named.trainable()] == [name for name, _ in listed.trainable()] != []
    with pytest.raises(ConfigError, match="'all' must be a list of module names, or all-linear"):
        LoraSettings(targets="all")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_of_the_output_layer_is_trained(make: Make, dtype: str) -> None:
    policy = make(lora=LoraSettings(rank=2, targets=["q_proj", "lm_head"]), dtype=dtype)
    with torch.no_grad():
        for _, p in policy.trainable():
            p.normal_(0, 0.3)
    found = policy.logprobs(*batch())[0]
    expected = plain(policy.network.lm, *batch(), temperature=1.0)[0]
    tolerance = 2e-6 if dtype == "float32" else 0.4  # the stock forward rounds logits of about 60
    torch.testing.assert_close(found.detach(), expected, rtol=1e-5, atol=tolerance)
    found.sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for _, p in policy.trainable())
    with policy.reference():
        base = policy.logprobs(*batch())[0]
    torch.testing.assert_close(base, plain(make(dtype=dtype).network.lm, *batch(), temperature=1.0)[0], rtol=1e-5, atol=tolerance)
    assert (base - found).abs().max() > 0.1


@pytest.mark.parametrize("family", ["llama", "deepseek"])
def test_stock_libraries_load_what_was_trained(family: Family, make: Make, folders: dict[str, Path], tmp_path: Path) -> None:
    lora, full = make(family, lora=LoraSettings(rank=2)), make(family)
    for policy, name in ((lora, "lora"), (full, "full")):
        train(policy)
        (tmp_path / name).mkdir()
        policy.save(tmp_path / name, {key: p.detach() for key, p in policy.trainable()})
    base = transformers.AutoModelForCausalLM.from_pretrained(folders[family])
    stock = {
        "lora": PeftModel.from_pretrained(base, tmp_path / "lora"),
        "full": transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "full"),
    }
    for policy, name in ((lora, "lora"), (full, "full")):
        torch.testing.assert_close(
            plain(stock[name].eval(), *batch(), temperature=1.0)[0], policy.logprobs(*batch())[0], rtol=1e-4, atol=1e-5
        )
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "full")("a1").input_ids == full.encode("a1")
    again = make(family, lora=LoraSettings(rank=2, initial=str(tmp_path / "lora")))
    assert torch.equal(again.logprobs(*batch())[0], lora.logprobs(*batch())[0])


def test_prompts_and_where_answers_end(make: Make, folders: dict[str, Path]) -> None:
    policy = make()
    tokenizer = policy.tokenizer
    assert policy.decode(policy.encode([{"role": "user", "content": "2+2"}])) == "2+2"
    assert policy.encode([{"role": "user", "content": "2+2"}])[-1] == tokenizer.convert_tokens_to_ids("<|assistant|>")
    assert policy.encode("2+2") == tokenizer("2+2").input_ids
    assert policy.stop_ids == [tokenizer.eos_token_id]
    turn = tokenizer.convert_tokens_to_ids("<|user|>")
    file = folders["qwen3"] / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": [turn, tokenizer.eos_token_id]}))
    assert make("qwen3").stop_ids == [tokenizer.eos_token_id, turn]
    file.unlink()
    assert make("qwen3").stop_ids == [tokenizer.eos_token_id]


def test_a_hub_id_and_a_home_folder_are_read_as_their_files_are(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where Llama 3's answers end is told by generation_config alone."""
    shutil.copytree(folders["llama"], home := tmp_path / "home/model")
    config = home / "generation_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": [1, 3]}))
    shutil.copytree(home, tmp_path / "hub/models--owner--name/snapshots/abc")
    (refs := tmp_path / "hub/models--owner--name/refs").mkdir()
    (refs / "main").write_text("abc")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for pretrained in ("~/model", "owner/name"):
        policy = CausalLM(pretrained)
        policy.load()
        assert policy.stop_ids == [1, 3]


def test_what_cannot_be_loaded_is_refused_before_anything_is_read(tmp_path: Path, folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        CausalLM(str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match="not a transformers model: no config.json there, found nothing"):
        CausalLM(str(tmp_path))
    with pytest.raises(ConfigError, match="no linear layer ends in to_q; a block has .*self_attn.q_proj"):
        CausalLM(str(folders["llama"]), lora=LoraSettings(targets=["to_q"])).load()
