"""Where adapters of language models sit, over families; and adapters from elsewhere: their effect is the file's, or they are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

from lit_rl.errors import ConfigError
from lit_rl.miniatures.lm import build_lm, char_tokenizer
from lit_rl.policies.causal_lm import CausalLM
from lit_rl.policies.weights.adapters import adapted_name, named_tuner_layers
from lit_rl.policies.weights.lora import LoraSettings
from lit_rl.policies.weights.lora_sites import coverage, default_sites, named_sites
from lit_rl.strategies.checks import check_experts_reached
from lit_rl.strategies.zero import ZeroStrategy

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None,
}  # fmt: skip
OLD = {"vocab_size": 64, "eos_token_id": 1, "bos_token_id": 1}
GPT = OLD | {"n_embd": 32, "n_layer": 2, "n_head": 4}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4}
LATENT |= {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
DELTA = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"], "shared_expert_intermediate_size": 24, "head_dim": 8,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 16, "patch_size": 4
}  # fmt: skip
GATED = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
EXPERTS = {"gate_up_proj", "down_proj"}

FAMILIES: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "llama": ("LlamaConfig", SIZES, GATED),
    "gpt2": ("GPT2Config", GPT | {"n_positions": 64}, {"c_attn", "c_proj", "c_fc"}),
    "gpt_neox": ("GPTNeoXConfig", SIZES, {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
    "phi3": ("Phi3Config", SIZES, {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}),
    "gemma2": ("Gemma2Config", SIZES | {"head_dim": 8}, GATED),
    "falcon": ("FalconConfig", OLD | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
               {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
    "bloom": ("BloomConfig", OLD | {"hidden_size": 32, "n_layer": 2, "n_head": 4},
              {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
    "opt": ("OPTConfig", SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 16}, {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}),
    "mamba2": ("Mamba2Config", OLD | {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "num_heads": 8, "head_dim": 8,
                                      "n_groups": 2}, {"in_proj"}),
    "qwen3_moe": ("Qwen3MoeConfig", SIZES | MOE | {"head_dim": 8, "mlp_only_layers": [0]}, GATED | EXPERTS),
    "mixtral": ("MixtralConfig", SIZES | {"num_local_experts": 4}, ATTENTION | EXPERTS),
    "deepseek": ("DeepseekV3Config", SIZES | MOE | LATENT,
                 GATED - ATTENTION | EXPERTS | {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}),
    "qwen3_next": ("Qwen3NextConfig", SIZES | MOE | DELTA, GATED | EXPERTS | {"in_proj_qkvz", "in_proj_ba", "out_proj"}),
    "granite_moe": ("GraniteMoeSharedConfig", SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 24},
                    ATTENTION | EXPERTS | {"input_linear", "output_linear"}),
    "gpt_oss": ("GptOssConfig", SIZES | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}, ATTENTION | EXPERTS),
    "gemma3 with a vision tower": ("Gemma3Config", {"text_config": SIZES | {"head_dim": 8}, "vision_config": VISION,
                                                    "mm_tokens_per_image": 4, "image_token_index": 5}, GATED),
    "llava": ("LlavaConfig", {"text_config": SIZES | {"model_type": "llama"}, "vision_config": VISION | {"model_type": "clip_vision_model"},
                              "image_token_index": 5}, GATED),
}  # fmt: skip
TOKENS = torch.randint(9, 60, (2, 10), generator=torch.Generator().manual_seed(0))
Folder = Callable[[str], Path]


def new(family: str) -> Any:
    name, settings, _ = FAMILIES[family]
    config = getattr(transformers, name)(**settings)
    auto = transformers.AutoModelForImageTextToText if "vision_config" in settings else transformers.AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return auto.from_config(config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    made: dict[str, Path] = {}

    def build(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp("lm") / "model"
            new(family).save_pretrained(made[family])
            char_tokenizer("0123456789 abcde", chat=False, max_length=64).save_pretrained(made[family])
        return made[family]

    return build


def loaded(folder: Path, **settings: Any) -> CausalLM:
    policy = CausalLM(str(folder), **settings)
    policy.load()
    return policy


def move(policy: CausalLM) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, p in policy.trainable():
            p.normal_(0, 0.1, generator=generator)


@torch.no_grad()
def logits(lm: Any) -> Tensor:
    return lm.eval()(input_ids=TOKENS).logits


def logprobs(policy: CausalLM) -> Tensor:
    lengths = torch.tensor([10, 10])
    return policy.logprobs(TOKENS, lengths, torch.ones(2, 9, dtype=torch.bool))[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_default_covers_the_decoder_layers_and_stock_peft_reads_the_export(family: str, folder: Folder, tmp_path: Path) -> None:
    """Every named kind of layer, every layer of its kind, no vision tower, router or head; each is reached by the loss."""
    policy = loaded(folder(family), lora=LoraSettings(rank=2))
    lm: Any = policy.network.lm
    names = {adapted_name(name, layer) for name, layer in named_tuner_layers(lm)}
    assert {name.rpartition(".")[2] for name in names} == FAMILIES[family][2]
    assert names == default_sites(new(family)).names and not any("vision" in name or "router" in name for name in names)
    move(policy)
    logprobs(policy.train()).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for _, p in policy.trainable())
    policy.save(tmp_path, {name: p.detach() for name, p in policy.trainable()})
    auto = transformers.AutoModelForImageTextToText if "vision_config" in FAMILIES[family][1] else transformers.AutoModelForCausalLM
    stock = peft.PeftModel.from_pretrained(auto.from_pretrained(folder(family)), tmp_path)
    torch.testing.assert_close(logits(stock), logits(lm), rtol=1e-4, atol=1e-5)
    again = loaded(folder(family), lora=LoraSettings(initial=str(tmp_path)))
    assert torch.equal(logits(again.network.lm), logits(lm))
    with again.reference():
        assert torch.equal(logits(again.network.lm), logits(lm))
    with policy.reference():
        torch.testing.assert_close(logits(lm), logits(auto.from_pretrained(folder(family))))
    torch.testing.assert_close(logits(stock.merge_and_unload()), logits(again.network.lm), rtol=1e-4, atol=1e-4)


def test_the_covered_share_is_counted_and_what_is_left_out_is_named() -> None:
    """A layer has 4 x 32 x 32 weights in attention, 3 matrices of experts of 4 x 32 x 48 and a router of 4 x 32."""
    lm = new("mixtral")
    attention, experts, router = 2 * 32 * 32 + 2 * 16 * 32, 3 * 4 * 32 * 48, 4 * 32
    share = (attention + experts) / (attention + experts + router)
    said = coverage(lm, default_sites(lm))
    assert f"sits on {share:.1%} of the weights" in said and f"left out: mlp.gate {1 - share:.1%}" in said
    alone = attention / (attention + experts + router)
    assert f"sits on {alone:.1%}" in coverage(lm, named_sites(lm, ["q_proj", "k_proj", "v_proj", "o_proj"]))
    mamba = new("mamba2")
    assert "kernels read the weights of out_proj past an adapter" in coverage(mamba, default_sites(mamba))


def test_names_choose_within_the_decoder() -> None:
    """The vision tower has a q_proj too; experts are named like layers; layers that a kernel reads are refused."""
    assert len(named_sites(new("gemma3 with a vision tower"), ["q_proj"]).layers) == 2
    chosen = named_sites(new("deepseek"), ["down_proj"])
    assert (len(chosen.layers), len(chosen.experts)) == (2, 1)
    with pytest.raises(ConfigError, match=r"no linear layer ends in w1; a block has .*mlp.experts.gate_up_proj.*fused: name gate_up_proj"):
        named_sites(new("mixtral"), ["w1"])
    with pytest.raises(ConfigError, match=r"reads the weight of .*out_proj.* leave out_proj out"):
        named_sites(new("mamba2"), ["in_proj", "out_proj"])


def test_fused_experts_take_no_dropout(folder: Folder) -> None:
    with pytest.raises(ConfigError, match=r"lora\.dropout: fused experts take none"):
        loaded(folder("mixtral"), lora=LoraSettings(rank=2, dropout=0.1))


def test_zero_3_would_not_reach_fused_experts(folder: Folder) -> None:
    lm = loaded(folder("mixtral"), lora=LoraSettings(rank=2)).network
    check_experts_reached(ZeroStrategy(stage=2), lm)
    with pytest.raises(ConfigError, match=r"lora\.targets: 4 parameters such as lm\.model\.layers\.0\.mlp\.experts\.down_proj"):
        check_experts_reached(ZeroStrategy(stage=3), lm)
    check_experts_reached(ZeroStrategy(stage=3), loaded(folder("llama"), lora=LoraSettings(rank=2)).network)


# ---------------------------------------------------------------------- adapters from elsewhere
@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_lm(tmp_path_factory.mktemp("lm") / "model", hidden=32)


def foreign(base: Path, folder: Path, **settings: Any) -> Any:
    """An adapter that PEFT made and wrote."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | settings)
    torch.manual_seed(0)
    model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_(0, 0.2)
    model.save_pretrained(folder)
    return model


STRENGTHS: dict[str, dict[str, Any]] = {
    "plain": {},
    "root of the rank": {"use_rslora": True},
    "alpha by layer": {"alpha_pattern": {"layers.0.self_attn.q_proj": 1.0}},
    "rank and alpha by layer": {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 3}, "use_rslora": True},
    "one layer": {"layers_to_transform": [1]},
    "a pattern": {"target_modules": r".*\.1\..*(q|o)_proj"},
    "all but one": {"target_modules": "all-linear", "exclude_modules": ["layers.0.self_attn.q_proj"]},
    "the output layer": {"target_modules": ["q_proj", "lm_head"]},
    "dropout": {"lora_dropout": 0.5},
}


@pytest.mark.parametrize("kind", STRENGTHS)
def test_an_initial_adapter_is_as_strong_as_its_file_says(kind: str, base: Path, tmp_path: Path) -> None:
    foreign(base, tmp_path / "first", **STRENGTHS[kind])
    policy = loaded(base, lora=LoraSettings(initial=str(tmp_path / "first")))
    stock = logits(peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), tmp_path / "first"))
    assert torch.equal(logits(policy.network.lm), stock)
    assert torch.equal(logprobs(policy.train()), logprobs(policy.eval()))
    with policy.reference():
        assert torch.equal(logits(policy.network.lm), stock)
    (tmp_path / "export").mkdir()
    policy.save(tmp_path / "export", {name: p.detach() for name, p in policy.trainable()})
    again = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), tmp_path / "export")
    assert torch.equal(logits(again), stock)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"bias": "lora_only"},
        {"lora_bias": True},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [3]},
        {"init_lora_weights": "pissa"},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_an_initial_adapter_that_is_more_than_low_rank_is_refused(settings: dict[str, Any], base: Path, tmp_path: Path) -> None:
    foreign(base, tmp_path, **settings)
    field, value = next(iter(settings.items()))
    with pytest.raises(ConfigError, match="embed_tokens" if field == "target_modules" else f"{field}={value!r}".replace("[", r"\[")):
        loaded(base, lora=LoraSettings(initial=str(tmp_path)))


@pytest.mark.parametrize(
    ("field", "value"),
    [("lora_alpha", "8"), ("lora_alpha", None), ("lora_alpha", 0), ("r", 0), ("rank_pattern", ["q_proj"]), ("alpha_pattern", {"q": "2"}),
     ("target_modules", 3), ("target_modules", "*(")],
)  # fmt: skip
def test_a_field_of_an_adapter_that_says_nothing_is_named_before_weights_are_read(
    field: str, value: Any, base: Path, tmp_path: Path
) -> None:
    foreign(base, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {field: value}))
    for pretrained, initial in ((base, str(tmp_path)), (tmp_path, None)):
        with pytest.raises(ConfigError, match=rf"lora\.initial: {field} of '.*adapter_config\.json' is .*, expected"):
            CausalLM(str(pretrained), lora=LoraSettings(initial=initial))


def test_an_initial_adapter_that_contradicts_the_settings_or_the_model_is_refused(base: Path, folder: Folder, tmp_path: Path) -> None:
    foreign(base, tmp_path)
    for other in ({"rank": 2}, {"alpha": 4.0}, {"targets": ["q_proj"]}, {"targets": "all-linear"}):
        with pytest.raises(ConfigError, match=r"lora\.initial: .* adapters of 4 layers of rank 4 and alpha 8"):
            loaded(base, lora=LoraSettings(initial=str(tmp_path), **other))
    loaded(base, lora=LoraSettings(initial=str(tmp_path), rank=4, alpha=8.0, targets=["q_proj", "v_proj"]))
    with pytest.raises(ConfigError, match=r"lora\.initial: .* does not fit this GPT2LMHeadModel"):
        loaded(folder("gpt2"), lora=LoraSettings(initial=str(tmp_path)))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj", "k_proj", "v_proj"]}))
    with pytest.raises(ConfigError, match=r"is not the adapter that its configuration names: 4 tensors are missing"):
        loaded(base, lora=LoraSettings(initial=str(tmp_path)))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"version https://git-lfs")
    with pytest.raises(ConfigError, match="not a file of tensors, or not a whole one"):
        loaded(base, lora=LoraSettings(initial=str(tmp_path)))
