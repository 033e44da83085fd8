"""Adapters go from stage to stage: as `pretrained` of the next one, and merged into one model that stock libraries load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
import transformers
from lora_folders import TOKENS, logits, moved

from lit_rl.errors import ConfigError
from lit_rl.merge import main, merge
from lit_rl.miniatures.images import build_sd3
from lit_rl.miniatures.lm import build_lm
from lit_rl.policies.causal_lm import CausalLM
from lit_rl.policies.critic import Critic
from lit_rl.policies.sd3 import SD3Policy
from lit_rl.policies.weights.lora import LoraSettings


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_lm(tmp_path_factory.mktemp("lm") / "model", hidden=32)


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return moved(CausalLM(str(base), lora=LoraSettings(rank=2, alpha=6.0)), tmp_path / "stage1")


def test_an_adapter_is_trained_on_by_its_folder_alone(base: Path, adapter: Path, tmp_path: Path) -> None:
    """Three stages: each starts, and has as its reference, what the one before it exported; the base goes with all of them."""
    stock = logits(peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), adapter))
    second = CausalLM(str(adapter), lora=LoraSettings())
    second.load()
    assert second.pretrained == str(base) and second.encode("a1") == CausalLM(str(base)).encode("a1")
    assert torch.equal(logits(second.network.lm), stock)
    with second.reference():
        assert torch.equal(logits(second.network.lm), stock)
    third = CausalLM(str(moved(second, tmp_path / "stage2")), lora=LoraSettings(rank=2, alpha=6.0))
    third.load()
    assert third.pretrained == str(base) and torch.equal(logits(third.network.lm), logits(second.network.lm))


def test_an_adapter_that_cannot_be_trained_on_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=rf"is a LoRA adapter of {base}: set model.policy.lora, .*python -m lit_rl.merge {adapter} --base"
    ):
        CausalLM(str(adapter))
    with pytest.raises(ConfigError, match="lora.initial names another"):
        CausalLM(str(adapter), lora=LoraSettings(initial=str(tmp_path)))
    with pytest.raises(ConfigError, match=rf"is a LoRA adapter of {base}: give {base} here, and this folder as lora.initial"):
        Critic(str(adapter))
    with pytest.raises(ConfigError, match="of rank 2 and alpha 6, the settings ask for .* rank 4"):
        CausalLM(str(adapter), lora=LoraSettings(rank=4)).load()


def test_a_critic_starts_where_the_policy_does(adapter: Path) -> None:
    policy = CausalLM(str(adapter), lora=LoraSettings())
    policy.load()
    for lora in (None, LoraSettings(rank=2)):
        critic = Critic(lora=lora)
        critic.load(policy)
        hidden = [part.eval()(input_ids=TOKENS).last_hidden_state for part in (critic.network.lm.base_model, policy.network.lm.base_model)]
        torch.testing.assert_close(*hidden, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["plain", "tied output layer", "experts", "bfloat16"])
def test_a_merged_model_is_the_adapted_one(kind: str, base: Path, tmp_path: Path) -> None:
    model = base
    targets = None
    if kind == "tied output layer":
        model, targets = build_lm(tmp_path / "model", hidden=32, tied=True), ["q_proj", "lm_head"]
    if kind == "experts":
        model = build_lm(tmp_path / "model", hidden=32, family="deepseek")
    if kind == "bfloat16":
        model = tmp_path / "model"
        build_lm(model, hidden=32)
        transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(model)
    adapter = moved(CausalLM(str(model), lora=LoraSettings(rank=2, alpha=2.0, targets=targets)), tmp_path / "adapter")
    main([str(adapter), "--out", str(tmp_path / "merged")])
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    stock = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(model), adapter)
    if kind == "bfloat16":  # rounded where the adapted model rounds after each product; the weights are the sums
        layer = stock.base_model.model.model.layers[0].self_attn.q_proj
        expected = layer.base_layer.weight.float() + layer.get_delta_weight("default").float()
        torch.testing.assert_close(whole.model.layers[0].self_attn.q_proj.weight.float(), expected, rtol=2**-7, atol=2e-3)
    else:
        torch.testing.assert_close(logits(whole), logits(stock), rtol=1e-4, atol=1e-4)
    assert whole.dtype == (torch.bfloat16 if kind == "bfloat16" else torch.float32)
    assert CausalLM(str(tmp_path / "merged")).stop_ids == CausalLM(str(model)).stop_ids
    assert CausalLM(str(tmp_path / "merged")).encode("a1") == CausalLM(str(model)).encode("a1")


def test_pipelines_go_from_stage_to_stage_and_merge(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"height": 16, "width": 16, "hidden": 32, "heads": 2, "layers": 2, "text_hidden": 16, "t5_hidden": 32}
    model = build_sd3(tmp_path / "model", **sizes)
    how: dict[str, Any] = {"resolution": 16, "max_sequence_length": 8}
    first = SD3Policy(str(model), lora=LoraSettings(rank=2, alpha=6.0), **how)
    adapter = moved(first, tmp_path / "adapter")
    x, t, cond = torch.randn(1, *first.latent_shape()), torch.tensor([0.5]), first.encode(["a"])
    with torch.no_grad():
        expected = first.velocity(x, t, cond)
        second = SD3Policy(str(adapter), lora=LoraSettings(), **how)
        second.load()
        assert torch.equal(second.velocity(x, t, cond), expected)
        merge(adapter, tmp_path / "merged")
        whole = SD3Policy(str(tmp_path / "merged"), **how)
        whole.load()
        torch.testing.assert_close(whole.velocity(x, t, cond), expected, rtol=1e-4, atol=1e-5)
    assert diffusers.SD3Transformer2DModel.from_pretrained(tmp_path / "merged/transformer").dtype == torch.float32
    with pytest.raises(ConfigError, match="set model.policy.lora"):
        SD3Policy(str(adapter), **how)


def test_what_cannot_be_merged_gets_a_sentence(base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    (tmp_path / "empty").mkdir()
    other = build_lm(tmp_path / "other", hidden=64)
    for words, said in (
        ([str(tmp_path / "nowhere"), "--out", str(tmp_path / "a")], "no such adapter"),
        ([str(adapter), "--out", str(tmp_path / "full")], "is there already"),
        ([str(tmp_path / "empty"), "--out", str(tmp_path / "a")], "no file of tensors"),
        ([str(adapter), "--base", str(other), "--out", str(tmp_path / "a")], "cannot be added to this Qwen2ForCausalLM"),
        ([str(adapter), "--base", str(tmp_path / "gone"), "--out", str(tmp_path / "a")], "no such folder"),
    ):
        with pytest.raises(SystemExit):
            main(words)
        assert said in capsys.readouterr().err
