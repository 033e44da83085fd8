"""A from-config miniature of DeepGen: SD3.5 without text encoders, Qwen2.5-VL, and a checkpoint with the bridge between them.

    python -m lit_rl.miniatures.deepgen FOLDER [--seed 0 --hidden 64 ...]

The three are at FOLDER/sd3, FOLDER/language and FOLDER/checkpoint.pth, as DeepGen's users have them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from lit_rl.miniatures.images import VaeKind, build_sd3
from lit_rl.miniatures.lm import PRINTABLE, char_tokenizer

TURNS = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


def build_deepgen(
    folder: str | Path,
    *,
    height: int = 16,
    width: int = 32,
    vae: VaeKind = "pixel",
    factor: int = 2,
    patch_size: int = 2,
    shift: float = 3.0,
    qk_norm: str | None = "rms_norm",
    hidden: int = 64,
    heads: int = 2,
    layers: int = 2,
    language_hidden: int = 32,
    language_layers: int = 8,
    language_std: float = 0.15,
    queries: int = 6,
    connector_hidden: int = 32,
    connector_layers: int = 1,
    connector_heads: int = 2,
    adapter_rank: int | None = 4,
    seed: int = 0,
) -> Path:
    """Save the three and return their folder.

    factor, patch_size, shift, qk_norm: see `lit_rl.miniatures.images.build_sd3`. hidden, heads, layers: of the transformer.
    language_layers: every sixth hidden state below the last layer is fused. language_std: of the decoder's random matrices; the smaller
    they are, the less a token's state depends on its neighbours, and what a bridge learns of a character then holds beside any other one.
    adapter_rank: of the language model's adapter in the checkpoint; None leaves it out. A policy is told `connector_heads`, and
    alpha = 2 rank.
    """
    place, text = Path(folder), connector_hidden
    build_sd3(
        place / "sd3", height=height, width=width, vae=vae, factor=factor, patch_size=patch_size, shift=shift, hidden=hidden, heads=heads,
        layers=layers, qk_norm=qk_norm, dual_attention_layers=(0,), text_hidden=text // 2, t5_hidden=text, seed=seed,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = _language(place / "language", hidden=language_hidden, layers=language_layers, std=language_std)
        fused = len(range(language_layers - 1, 0, -6))
        state = bridge_weights(
            language_hidden, fused, queries=queries, hidden=connector_hidden, intermediate=2 * connector_hidden, layers=connector_layers,
            heads=connector_heads, sequence=connector_hidden,
        )  # fmt: skip
        if adapter_rank:
            state |= adapter_weights(decoder, adapter_rank)
    torch.save({"state_dict": state}, place / "checkpoint.pth")
    return place


def _language(folder: Path, *, hidden: int, layers: int, std: float) -> nn.Module:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = char_tokenizer(PRINTABLE, chat=False, max_length=512)
    tokenizer.add_special_tokens({"additional_special_tokens": TURNS})
    start, end, image, video = tokenizer.convert_tokens_to_ids(TURNS[2:])
    head = hidden // 4
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [head // 8, head // 8, head // 2 - head // 8 * 2]},
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "out_hidden_size": hidden,
        "fullatt_block_indexes": [0],
    }
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True, vision_start_token_id=start, vision_end_token_id=end,
        image_token_id=image, video_token_id=video,
    )  # fmt: skip
    model = Qwen2_5_VLForConditionalGeneration(config)
    table = model.get_input_embeddings()
    assert isinstance(table, nn.Embedding)
    nn.init.normal_(table.weight, std=1.0)  # what a character is stays visible in every hidden state
    for name, values in model.model.language_model.layers.named_parameters():
        if name.endswith(("q_proj.bias", "k_proj.bias")):
            nn.init.normal_(values, std=3.0)  # each head looks at a distance of its own, so a state says what stands around it
        elif values.ndim == 2:
            nn.init.normal_(values, std=std)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.model.language_model


def bridge_weights(
    language: int, fused: int, *, queries: int, hidden: int, intermediate: int, layers: int, heads: int, sequence: int
) -> dict[str, Tensor]:
    """A new bridge from `fused` states of width `language` to conditions of width `sequence`, as a checkpoint names its tensors."""
    from transformers import SiglipVisionConfig
    from transformers.models.siglip.modeling_siglip import SiglipEncoder

    config = SiglipVisionConfig(hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads)
    encoder: Callable[..., nn.Module] = SiglipEncoder
    parts: dict[str, nn.Module] = {
        "connector": encoder(config),
        "projector_1": nn.Linear(fused * language, hidden),
        "projector_2": nn.Linear(hidden, hidden),
        "projector_3": nn.Linear(hidden, sequence),
    }
    for part in parts.values():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=part.in_features**-0.5)  # keeps the size of what comes in
    found = {f"{part}.{name}": tensor for part, module in parts.items() for name, tensor in module.state_dict().items()}
    return found | {"meta_queries": torch.randn(queries, language) * language**-0.5}


def adapter_weights(decoder: nn.Module, rank: int) -> dict[str, Tensor]:
    """On every linear layer and the embedding, as DeepGen's; under the names of transformers 4.51."""
    found: dict[str, Tensor] = {}
    for name, module in decoder.named_modules():
        if isinstance(module, nn.Linear):
            found[f"lmm.model.{name}.lora_A.default.weight"] = torch.randn(rank, module.in_features) * 0.1
            found[f"lmm.model.{name}.lora_B.default.weight"] = torch.randn(module.out_features, rank) * 0.1
        elif isinstance(module, nn.Embedding):
            found[f"lmm.model.{name}.lora_embedding_A.default"] = torch.randn(rank, module.num_embeddings) * 0.1
            found[f"lmm.model.{name}.lora_embedding_B.default"] = torch.randn(module.embedding_dim, rank) * 0.1
    return found


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(build_deepgen, as_positional=True)
