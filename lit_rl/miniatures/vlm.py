"""From-config miniatures of vision-language models in transformers format: random weights, a tokenizer of characters, nothing downloaded.

python -m lit_rl.miniatures.vlm FOLDER [--family qwen25_vl --hidden 64 --layers 2 ...]
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from lit_rl.miniatures.lm import PRINTABLE, char_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Family = Literal["qwen25_vl", "qwen3_vl", "qwen3_vl_moe"]

HEAD = 32
"""Size of an attention head: the least that vLLM's attention on a CPU takes."""

ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5]}

SPREAD = 0.06
"""Standard deviation of random weights. By the families' own 0.02 a small model does not learn to look for a long time."""

TURN = ("<|im_start|>", "<|im_end|>")
VISION = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")

CHAT_TEMPLATE = (
    "{%- for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] in ('image', 'image_url') %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen's own template without its system message."""

PATCH = {"qwen25_vl": 14, "qwen3_vl": 16, "qwen3_vl_moe": 16}

SHADES = {
    "qwen25_vl": ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
    "qwen3_vl": ([0.5] * 3, [0.5] * 3),
    "qwen3_vl_moe": ([0.5] * 3, [0.5] * 3),
}
"""Mean and standard deviation that pixels are normalized with, as the families' own folders name them."""


def build_vlm(
    folder: str | Path,
    *,
    family: Family = "qwen25_vl",
    characters: str = PRINTABLE,
    words: Sequence[str] = (),
    hidden: int = 64,
    layers: int = 2,
    vision_hidden: int = 64,
    vision_layers: int = 2,
    max_length: int = 2048,
    max_side: int = 224,
    tied: bool = False,
    patch_spread: float | None = None,
    seed: int = 0,
) -> Path:
    """Save a random vision-language model with tokenizer and image processor and return its folder.

    family: Qwen2.5-VL (vision patches of 14 pixels, attention in windows) or Qwen3-VL (of 16 pixels, features for the first layers), of
    which the largest have experts.
    characters, words: One token each; words are found first. hidden, vision_hidden: Multiples of 32. max_side: Pictures of more than its
    square, in pixels, are scaled down. patch_spread: Standard deviation of the weights that read patches, by default that of all: with a
    smaller one (0.02) a model finds sooner where something is.
    """
    tokenizer = _tokenizer(characters, words, max_length)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _model(family, tokenizer, hidden, layers, vision_hidden, vision_layers, max_length, tied)
        if family != "qwen25_vl":  # else the places of patches are drowned by what is on them
            torch.nn.init.normal_(model.get_parameter("model.visual.pos_embed.weight"))
        if patch_spread is not None:
            torch.nn.init.normal_(model.get_parameter("model.visual.patch_embed.proj.weight"), std=patch_spread)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _save_processor(Path(folder), family, max_side)
    return Path(folder)


def _tokenizer(characters: str, words: Sequence[str], max_length: int) -> PreTrainedTokenizerFast:
    tokenizer = char_tokenizer(characters, chat=False, max_length=max_length)
    tokenizer.add_special_tokens({"additional_special_tokens": [*TURN, *VISION], "eos_token": TURN[1]})
    tokenizer.add_tokens(list(words))
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _model(
    family: Family,
    tokenizer: PreTrainedTokenizerFast,
    hidden: int,
    layers: int,
    vision_hidden: int,
    vision_layers: int,
    max_length: int,
    tied: bool,
) -> PreTrainedModel:
    import transformers

    text = _text(tokenizer, hidden, layers, max_length, tied)
    vision: dict[str, object] = {
        "depth": vision_layers,
        "hidden_size": vision_hidden,
        "intermediate_size": 2 * vision_hidden,
        "num_heads": vision_hidden // HEAD,
        "out_hidden_size": hidden,
        "patch_size": PATCH[family],
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "initializer_range": SPREAD,
    }
    ids = [tokenizer.get_vocab()[token] for token in VISION]
    names = ("vision_start_token_id", "vision_end_token_id", "vision_token_id", "image_token_id", "video_token_id")
    special = dict(zip(names, ids, strict=True)) | {"tie_word_embeddings": tied}
    if family == "qwen25_vl":
        vision |= {"window_size": 4 * PATCH[family], "fullatt_block_indexes": [vision_layers - 1]}
        parts = {"text_config": text | {"rope_parameters": ROPE}, "vision_config": vision}
        return transformers.Qwen2_5_VLForConditionalGeneration(transformers.Qwen2_5_VLConfig.from_dict(parts | special))
    text |= {"head_dim": HEAD, "rope_parameters": ROPE | {"mrope_interleaved": True}}
    vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    special.pop("vision_token_id")
    parts = {"text_config": text, "vision_config": vision}
    if family == "qwen3_vl":
        return transformers.Qwen3VLForConditionalGeneration(transformers.Qwen3VLConfig.from_dict(parts | special))
    text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 3 * hidden // 2, "norm_topk_prob": True}
    return transformers.Qwen3VLMoeForConditionalGeneration(transformers.Qwen3VLMoeConfig.from_dict(parts | special))


def _text(tokenizer: PreTrainedTokenizerFast, hidden: int, layers: int, max_length: int, tied: bool) -> dict[str, object]:
    heads = hidden // HEAD
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 2),
        "max_position_embeddings": max_length,
        "tie_word_embeddings": tied,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        "initializer_range": SPREAD,
    }


def _save_processor(folder: Path, family: Family, max_side: int) -> None:
    """The processors' settings, as stock processors read them. Written as text: the one of videos cannot be built without torchvision."""
    patch = PATCH[family]
    name = "Qwen2_5_VLProcessor" if family == "qwen25_vl" else "Qwen3VLProcessor"
    mean, std = SHADES[family]
    shades: dict[str, object] = {"image_mean": mean, "image_std": std}
    common: dict[str, object] = {"patch_size": patch, "temporal_patch_size": 2, "merge_size": 2, "processor_class": name, **shades}
    pictures = {"image_processor_type": "Qwen2VLImageProcessor", "size": {"shortest_edge": (2 * patch) ** 2, "longest_edge": max_side**2}}
    films = {"video_processor_type": "Qwen2VLVideoProcessor" if family == "qwen25_vl" else "Qwen3VLVideoProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(common | pictures, indent=2))
    (folder / "video_preprocessor_config.json").write_text(json.dumps(common | films, indent=2))


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(build_vlm, as_positional=True)
