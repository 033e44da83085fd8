import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from golden_numbers import assert_close, load
from torch import Tensor, nn

from lit_rl.checkpoints.ip_adapter import to_sections
from lit_rl.errors import ConfigError
from lit_rl.policies.ip_adapter import (
    ImageProjection,
    MLPProjection,
    QFormerProjection,
    StyleAttention,
    adapter_names,
    add_ip_adapter,
    load_ip_adapter,
    style_attentions,
)
from lit_rl.policies.weights.lora import LoraSettings, add_lora

QFORMER_HEADS = 2  # of the golden model; no shape tells
FEATURES, CONTEXT, HEAD, TOKENS = 6, 16, 8, 3


def transformer(**config: Any) -> nn.Module:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    return FluxTransformer2DModel(**config).eval()


def stock(heads: int = 2) -> nn.Module:
    return transformer(
        in_channels=12,
        out_channels=4,
        num_layers=2,
        num_single_layers=1,
        attention_head_dim=HEAD,
        num_attention_heads=heads,
        joint_attention_dim=CONTEXT,
        pooled_projection_dim=5,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )


def projection(*, qformer: bool = True, width: int = CONTEXT) -> ImageProjection:
    sizes = {"tokens": TOKENS, "width": width}
    return ImageProjection(
        MLPProjection(FEATURES, **sizes), QFormerProjection(FEATURES, **sizes, key_tokens=2, heads=2) if qformer else None
    )


@pytest.fixture
def batch() -> SimpleNamespace:
    g = torch.Generator().manual_seed(1)
    inputs = {
        "hidden_states": torch.randn(2, 4, 12, generator=g),
        "encoder_hidden_states": torch.randn(2, 3, CONTEXT, generator=g),
        "pooled_projections": torch.randn(2, 5, generator=g),
        "timestep": torch.tensor([0.9, 0.3]),
        "guidance": torch.tensor([30.0, 30.0]),
        "img_ids": torch.cartesian_prod(*(torch.arange(n).float() for n in (1, 2, 2))),
        "txt_ids": torch.zeros(3, 3),
    }
    return SimpleNamespace(inputs=inputs, features=torch.randn(2, FEATURES, generator=g))


def styled(*, heads: int = 2, **kwargs: Any) -> nn.Module:
    """A network whose style has been trained: every weight of the adapter is random."""
    network = stock(heads)
    add_ip_adapter(network, projection(**kwargs))
    for attention in style_attentions(network):
        nn.init.normal_(attention.to_v_ip.weight, std=0.3)
    return network


def velocity(network: nn.Module, batch: SimpleNamespace, features: Tensor | None = None) -> Tensor:
    joint = None if features is None else {"style_features": features}
    return network(**batch.inputs, joint_attention_kwargs=joint, return_dict=False)[0]


@pytest.mark.golden
def test_outputs_are_those_of_the_published_classes(golden_dir: Path) -> None:
    data = load(golden_dir / "calligrapher", "tiny_calligrapher")
    config = json.loads((golden_dir / "calligrapher" / "tiny_calligrapher.json").read_text())["transformer"]
    filed: dict[str, dict[str, Tensor]] = to_sections({k.removeprefix("w/"): v for k, v in data.items() if k.startswith("w/")})
    network = transformer(**config)
    network.load_state_dict({k: v for k, v in filed["transformer"].items() if ".processor." not in k})
    weights = {
        "image_proj": filed["image_proj_mlp"],
        "image_proj_qformer": filed["image_proj_qformer"],
        "ip_adapter": filed["attn_adapter"],
    }
    add_ip_adapter(network, ImageProjection.like(weights, heads=QFORMER_HEADS))
    load_ip_adapter(network, weights)

    features, tokens = data["siglip_pooled"], data["image_emb"]
    assert_close(network.image_proj.mlp(features), data["mlp_out"], f32=1e-5, what="MLP")
    assert_close(network.image_proj.qformer(features), data["qformer_out"], f32=1e-5, what="Q-Former")
    assert_close(network.image_proj(features), tokens, f32=1e-5, what="tokens")
    asked: dict[str, tuple[dict[str, Tensor] | None, float]] = {
        "pred": ({"style_features": features}, 1.0),
        "pred_no_ip": (None, 1.0),
        "pred_zero_tokens": ({"style_tokens": torch.zeros_like(tokens)}, 1.0),
    }
    scales = {key: float(key.removeprefix("pred_scale")) for key in data if key.startswith("pred_scale")}
    asked |= {key: ({"style_tokens": tokens}, scale) for key, scale in scales.items()}
    assert asked.keys() == {key for key in data if key.startswith("pred")}
    for key, (joint, scale) in asked.items():
        for attention in style_attentions(network):
            attention.scale = scale
        with torch.no_grad():
            out = network(
                hidden_states=data["hidden"],
                encoder_hidden_states=data["txt"],
                pooled_projections=data["pooled"],
                timestep=data["t"],
                guidance=data["guidance"],
                img_ids=data["img_ids"],
                txt_ids=data["txt_ids"],
                joint_attention_kwargs=joint,
                return_dict=False,
            )[0]
        assert_close(out, data[key], f32=1e-5, what=key)


@pytest.mark.parametrize("heads", [1, 2])
def test_without_style_it_is_the_stock_network_bit_for_bit(heads: int, batch: SimpleNamespace) -> None:
    plain, network = velocity(stock(heads), batch), styled(heads=heads)
    assert torch.equal(velocity(network, batch), plain)
    assert torch.equal(velocity(network, batch, torch.zeros_like(batch.features)), plain)
    for attention in style_attentions(network):
        attention.scale = 0.0
    assert torch.equal(velocity(network, batch, batch.features), plain)


def test_a_new_adapter_changes_nothing_yet_but_learns(batch: SimpleNamespace) -> None:
    network = stock()
    add_ip_adapter(network, projection())
    out = velocity(network, batch, batch.features)
    assert torch.equal(out, velocity(stock(), batch))
    out.square().sum().backward()
    assert all(attention.to_v_ip.weight.grad.abs().max() > 0 for attention in style_attentions(network))


def test_new_adapters_are_drawn_from_the_seed_alone() -> None:
    drawn = []
    for seed in (7, 7, 8):
        network = stock()
        torch.rand(seed)
        add_ip_adapter(network, projection(), seed=seed)
        drawn.append(style_attentions(network)[1].to_k_ip.weight)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_each_row_has_its_own_style_or_none(batch: SimpleNamespace) -> None:
    network, plain = styled(), velocity(stock(), batch)
    out = velocity(network, batch, batch.features * torch.tensor([[0.0], [1.0]]))
    torch.testing.assert_close(out[0], plain[0])
    assert (out[1] - plain[1]).abs().max() > 1e-3
    torch.testing.assert_close(out[1], velocity(network, batch, batch.features)[1])
    out.square().sum().backward()
    grads = {name: p.grad for name, p in network.named_parameters() if name in adapter_names(network)}
    assert all(grad is not None and grad.isfinite().all() and grad.abs().max() > 0 for grad in grads.values())


def test_one_token_says_the_same_to_every_query_of_its_head() -> None:
    """softmax over one key is 1, so each query gets v: with tokens (1, 2) and V = [[1, 0], [0, 1], [1, 1], [2, 0]], v = (1, 2, 3, 2)."""
    attention = StyleAttention(width=4, context=2)
    attention.to_v_ip.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, 0.0]])
    said = attention.style(torch.randn(1, 5, 2, 2), torch.tensor([[[1.0, 2.0]]]))
    torch.testing.assert_close(said, torch.tensor([1.0, 2.0, 3.0, 2.0]).expand(1, 5, 4))


def test_keys_are_normalized_head_by_head() -> None:
    """k of any length is a direction: making one head's k_style longer changes nothing, in that head or the other."""
    attention, query, tokens = StyleAttention(width=8, context=2), torch.randn(1, 3, 2, 4), torch.randn(1, 5, 2)
    nn.init.normal_(attention.to_v_ip.weight)
    nn.init.normal_(attention.to_k_ip.weight, std=10)
    before = attention.style(query, tokens)
    attention.to_k_ip.weight.data[:4] *= 7
    torch.testing.assert_close(attention.style(query, tokens), before, atol=1e-4, rtol=1e-4)
    attention.to_k_ip.weight.data[0] *= -7
    assert (attention.style(query, tokens) - before)[..., :4].abs().max() > 1e-2
    torch.testing.assert_close(attention.style(query, tokens)[..., 4:], before[..., 4:], atol=1e-4, rtol=1e-4)


def test_style_reaches_image_rows_in_double_blocks_and_all_rows_in_single_ones() -> None:
    network, tokens = styled(), torch.randn(1, TOKENS, CONTEXT)
    image, text = torch.randn(1, 4, 2 * HEAD), torch.randn(1, 3, 2 * HEAD)
    double, single = network.transformer_blocks[0].attn, network.single_transformer_blocks[0].attn
    plain, with_style = (double(image, text, **kwargs) for kwargs in ({}, {"style_tokens": tokens}))
    assert torch.equal(plain[1], with_style[1])
    assert (plain[0] - with_style[0]).abs().amin(dim=-1).min() > 0
    rows = torch.cat([text, image], dim=1)
    assert (single(rows) - single(rows, style_tokens=tokens)).abs().amax(dim=-1).min() > 0


def test_a_copy_has_its_own_adapter(batch: SimpleNamespace) -> None:
    network = styled()
    frozen, before = copy.deepcopy(network), velocity(network, batch, batch.features)
    with torch.no_grad():
        for name in adapter_names(network):
            network.get_parameter(name).add_(1.0)
    assert torch.equal(velocity(frozen, batch, batch.features), before)
    assert not torch.equal(velocity(network, batch, batch.features), before)


def test_gradient_checkpointing_gives_the_same_gradient(batch: SimpleNamespace) -> None:
    grads = []
    for checkpointing in (False, True):
        network = styled().train()
        if checkpointing:
            network.enable_gradient_checkpointing()
        velocity(network, batch, batch.features).square().sum().backward()
        grads.append([network.get_parameter(name).grad for name in adapter_names(network)])
    torch.testing.assert_close(*grads)


def test_a_base_in_bfloat16_takes_an_adapter_in_float32(batch: SimpleNamespace) -> None:
    network = stock().to(torch.bfloat16)
    add_ip_adapter(network, projection())
    assert {network.get_parameter(name).dtype for name in adapter_names(network)} == {torch.float32}
    batch.inputs = {key: value if key in ("timestep", "guidance") else value.to(torch.bfloat16) for key, value in batch.inputs.items()}
    assert velocity(network, batch, batch.features).dtype == torch.bfloat16


def test_lora_goes_beside_it(batch: SimpleNamespace) -> None:
    network = styled()
    before = velocity(network, batch, batch.features)
    add_lora(network, LoraSettings(rank=2), targets=["attn.to_q", "attn.to_k"])
    torch.testing.assert_close(velocity(network, batch, batch.features), before)
    assert not [name for name, _ in network.named_parameters() if "processor" in name and "lora" in name]


@pytest.mark.parametrize("qformer", [False, True])
def test_adapter_files_name_every_weight_of_the_adapter_and_load_back(qformer: bool, batch: SimpleNamespace) -> None:
    network, other = styled(qformer=qformer), stock()
    names = adapter_names(network)
    assert names.keys() == {name for name, _ in network.named_parameters()} - {name for name, _ in stock().named_parameters()}
    assert names["transformer_blocks.1.attn.processor.to_k_ip.weight"] == "ip_adapter.1.to_k_ip.weight"
    assert names["single_transformer_blocks.0.attn.processor.to_v_ip.weight"] == "ip_adapter.2.to_v_ip.weight"
    weights = to_sections({filed: network.get_parameter(name).detach().clone() for name, filed in names.items()})
    assert weights.keys() == {"image_proj", "ip_adapter"} | ({"image_proj_qformer"} if qformer else set())
    add_ip_adapter(other, ImageProjection.like(weights, heads=2))
    load_ip_adapter(other, weights)
    assert torch.equal(velocity(other, batch, batch.features), velocity(network, batch, batch.features))


def test_weights_of_another_model_are_refused_and_nothing_is_copied() -> None:
    network = styled(qformer=False)
    weights = to_sections({filed: torch.zeros_like(network.get_parameter(name)) for name, filed in adapter_names(network).items()})
    before = copy.deepcopy(network.state_dict())
    wrong = {
        "image_proj": {**weights["image_proj"], "norm.bias": torch.zeros(4)},
        "ip_adapter": {"9.to_k_ip.weight" if key == "0.to_k_ip.weight" else key: value for key, value in weights["ip_adapter"].items()},
    }
    expected = (
        r"missing: ip_adapter.0.to_k_ip.weight; unknown: ip_adapter.9.to_k_ip.weight; other shapes: .*norm.bias \[4\] instead of \[16\]"
    )
    with pytest.raises(ConfigError, match=expected):
        load_ip_adapter(network, wrong)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_the_published_sizes_have_the_published_number_of_weights() -> None:
    """SigLIP so400m into 128 tokens of 4096 for FLUX.1-Fill-dev: 1.211 B + 0.372 B + 57 attentions of 2 * 4096 * 3072."""
    with torch.device("meta"):
        network = transformer(in_channels=384, out_channels=64, guidance_embeds=True)
        sizes = {"tokens": 128, "width": 4096}
        add_ip_adapter(network, ImageProjection(MLPProjection(1152, **sizes), QFormerProjection(1152, **sizes)))
    counts: dict[str, int] = {}
    for name, filed in adapter_names(network).items():
        section = filed.partition(".")[0]
        counts[section] = counts.get(section, 0) + network.get_parameter(name).numel()
    assert counts == {"image_proj": 1_211_148_544, "image_proj_qformer": 372_443_392, "ip_adapter": 1_434_451_968}


def test_tokens_of_another_width_than_the_text_are_refused() -> None:
    with pytest.raises(ConfigError, match="style tokens are 8 wide, the transformer's text 16"):
        add_ip_adapter(stock(), projection(width=8))
