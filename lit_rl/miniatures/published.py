"""Configs of published models, written as their folders hold them, without weights: what `python -m lit_rl.doctor` needs for memory.

python -m lit_rl.miniatures.published {qwen25_7b,qwen3_vl_4b,qwen3_vl_32b,sd35_medium,flux_dev,flux_fill,siglip,deepgen} FOLDER
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch

from lit_rl.miniatures.deepgen import adapter_weights, bridge_weights
from lit_rl.miniatures.full_size import CLIP_G, CLIP_L, CLIP_TOKENS, FLUX_DEV, FLUX_LATENTS, SD35_LATENTS, SD35_MEDIUM, T5_XXL, VAE

Published = Literal[
    "qwen25_7b", "qwen25_math_7b", "qwen25_vl_7b", "qwen25_vl_3b", "qwen3_vl_4b", "qwen3_vl_32b", "qwen3_06b_reward", "sd35_medium",
    "flux_dev", "flux_fill", "siglip", "clip_h", "clip_l", "deepgen",
]  # fmt: skip
Json = dict[str, object]

QWEN25_7B: Json = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
}
VISION: Json = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "out_hidden_size": 3584,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
QWEN25_VL_7B: Json = QWEN25_7B | {
    "model_type": "qwen2_5_vl",
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "max_position_embeddings": 128000,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_config": VISION,
}
QWEN25_VL_3B: Json = QWEN25_VL_7B | {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "vision_config": {**VISION, "out_hidden_size": 2048},
}
QWEN3_TEXT: Json = {
    "model_type": "qwen3_vl_text",
    "vocab_size": 151936,
    "hidden_size": 5120,
    "intermediate_size": 25600,
    "num_hidden_layers": 64,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 262144,
    "rope_theta": 5e6,
    "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
}
QWEN3_VL_32B: Json = {
    "model_type": "qwen3_vl",
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "tie_word_embeddings": False,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "text_config": QWEN3_TEXT,
    "vision_config": {
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_heads": 16,
        "out_hidden_size": 5120,
        "patch_size": 16,
    },
}
QWEN3_VL_4B: Json = QWEN3_VL_32B | {
    "tie_word_embeddings": True,
    "text_config": QWEN3_TEXT | {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
    "vision_config": {
        "depth": 24,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_heads": 16,
        "out_hidden_size": 2560,
        "patch_size": 16,
        "deepstack_visual_indexes": [5, 11, 17],
    },
}
QWEN3_PICTURES: Json = {
    "size": {"shortest_edge": 65536, "longest_edge": 16777216},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
QWEN_PICTURES: Json = {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
PICTURES: Mapping[str, Json] = {
    "qwen25_vl_7b": QWEN_PICTURES,
    "qwen25_vl_3b": QWEN_PICTURES,
    "qwen3_vl_4b": QWEN3_PICTURES,
    "qwen3_vl_32b": QWEN3_PICTURES,
}
QWEN3_06B: Json = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForSequenceClassification"],
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
SIGLIP: Json = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}
CLIP_VIT_H: Json = {
    "model_type": "clip",
    "projection_dim": 1024,
    "text_config": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    "vision_config": {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16, "patch_size": 14},
}
CLIP_VIT_L: Json = {
    "model_type": "clip",
    "projection_dim": 768,
    "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "vision_config": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14},
}
ALONE: Mapping[str, Json] = {
    "qwen25_7b": QWEN25_7B,
    "qwen25_math_7b": QWEN25_7B | {"max_position_embeddings": 4096, "rope_theta": 1e4},
    "qwen25_vl_7b": QWEN25_VL_7B,
    "qwen25_vl_3b": QWEN25_VL_3B,
    "qwen3_vl_4b": QWEN3_VL_4B,
    "qwen3_vl_32b": QWEN3_VL_32B,
    "qwen3_06b_reward": QWEN3_06B,
    "siglip": SIGLIP,
    "clip_h": CLIP_VIT_H,
    "clip_l": CLIP_VIT_L,
}
CLIP_TEXT: Json = {"model_type": "clip_text_model", "max_position_embeddings": CLIP_TOKENS}
T5: Json = {**T5_XXL, "model_type": "t5", "feed_forward_proj": "gated-gelu"}
FLOW = "FlowMatchEulerDiscreteScheduler"
FLUX: Mapping[str, tuple[str, str, Json]] = {
    "transformer": ("diffusers", "FluxTransformer2DModel", FLUX_DEV),
    "vae": ("diffusers", "AutoencoderKL", {**VAE, **FLUX_LATENTS}),
    "text_encoder": ("transformers", "CLIPTextModel", {**CLIP_L, **CLIP_TEXT}),
    "text_encoder_2": ("transformers", "T5EncoderModel", T5),
    "tokenizer": ("transformers", "CLIPTokenizer", {}),
    "tokenizer_2": ("transformers", "T5TokenizerFast", {}),
    "scheduler": ("diffusers", FLOW, {"shift": 3.0, "use_dynamic_shifting": True}),
}
PIPELINES: Mapping[str, tuple[str, Mapping[str, tuple[str, str, Json]]]] = {
    "sd35_medium": (
        "StableDiffusion3Pipeline",
        {
            "transformer": ("diffusers", "SD3Transformer2DModel", SD35_MEDIUM),
            "vae": ("diffusers", "AutoencoderKL", {**VAE, **SD35_LATENTS}),
            "text_encoder": ("transformers", "CLIPTextModelWithProjection", {**CLIP_L, **CLIP_TEXT}),
            "text_encoder_2": ("transformers", "CLIPTextModelWithProjection", {**CLIP_G, **CLIP_TEXT}),
            "text_encoder_3": ("transformers", "T5EncoderModel", T5),
            "tokenizer": ("transformers", "CLIPTokenizer", {}),
            "tokenizer_2": ("transformers", "CLIPTokenizer", {}),
            "tokenizer_3": ("transformers", "T5TokenizerFast", {}),
            "scheduler": ("diffusers", FLOW, {"shift": 3.0}),
        },
    ),
    "flux_dev": ("FluxPipeline", FLUX),
    "flux_fill": (
        "FluxFillPipeline",
        {**FLUX, "transformer": ("diffusers", "FluxTransformer2DModel", {**FLUX_DEV, "in_channels": 384, "out_channels": 64})},
    ),
}


def write_configs(model: Published, folder: str | Path) -> Path:
    """Write the config files of a published model, of which no weights are needed to know its size, and return their folder."""
    folder = Path(folder)
    if model == "deepgen":
        return _write_deepgen(folder)
    if model in ALONE:
        _write(folder / "config.json", ALONE[model])
        if model in PICTURES:
            _write(folder / "preprocessor_config.json", PICTURES[model])
        return folder
    name, parts = PIPELINES[model]
    _write(folder / "model_index.json", {"_class_name": name} | {part: [library, kind] for part, (library, kind, _) in parts.items()})
    for part, (library, kind, config) in parts.items():
        if config:  # tokenizers are named and not there
            file = "scheduler_config.json" if part == "scheduler" else "config.json"
            _write(folder / part / file, ({"_class_name": kind} if library == "diffusers" else {}) | config)
    return folder


def _write_deepgen(folder: Path) -> Path:
    """DeepGen's three places `sd3`, `language` and `checkpoint.pth`, of which the last names the shapes of bridge and adapter."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    write_configs("sd35_medium", folder / "sd3")
    language = AutoConfig.from_pretrained(write_configs("qwen25_vl_3b", folder / "language"))
    with torch.device("meta"):
        decoder = AutoModelForImageTextToText.from_config(language).model.language_model
        state = bridge_weights(2048, 6, queries=128, hidden=2048, intermediate=11946, layers=6, heads=32, sequence=4096)
        state |= adapter_weights(decoder, rank=64)
    torch.save({"state_dict": state}, folder / "checkpoint.pth")
    return folder


def _write(file: Path, content: Json) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(write_configs, as_positional=True)
