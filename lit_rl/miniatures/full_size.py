"""Pipelines of the published sizes of Stable Diffusion 3.5 Medium and FLUX.1-dev with random weights: for benchmarks and memory planning.

    python -m lit_rl.miniatures.full_size sizes
    python -m lit_rl.miniatures.full_size sd35_medium FOLDER [--text_encoders full] [--device cuda]
    python -m lit_rl.miniatures.full_size flux_dev FOLDER

Nothing is downloaded, so the pictures are noise, but every matrix has its published shape and costs what it costs. The tokenizers are those
of the miniatures (`lit_rl.miniatures.images`), one token per character; prompts are padded to the published lengths.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from lit_rl.miniatures.text_encoders import clip_tokenizer, t5_tokenizer

TextEncoders = Literal["small", "full"]
"""full: the published sizes. small: the published widths, which the transformer sees, in one thin layer each."""
Dtype = Literal["float32", "bfloat16", "float16"]

Sizes = dict[str, Any]

SD35_MEDIUM: Sizes = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
FLUX_DEV: Sizes = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}
VAE: Sizes = {
    "latent_channels": 16,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "sample_size": 1024,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
SD35_LATENTS = {"scaling_factor": 1.5305, "shift_factor": 0.0609}
FLUX_LATENTS = {"scaling_factor": 0.3611, "shift_factor": 0.1159}
CLIP_L: Sizes = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
}
CLIP_G: Sizes = {
    "vocab_size": 49408,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "projection_dim": 1280,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
}
T5_XXL: Sizes = {"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
CLIP_TOKENS = 77


def build_sd35_medium(
    folder: str | Path, *, text_encoders: TextEncoders = "small", dtype: Dtype = "bfloat16", device: str = "cpu", seed: int = 0
) -> Path:
    """Save a random Stable Diffusion 3.5 Medium (transformer: 2.24 B parameters) and return its folder: 5 GiB, 16 with full encoders.

    device: where the weights are drawn, e.g. "cuda", which is faster; they fit into its memory whole.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    with _drawing(dtype, device, seed):
        parts = _sd35_medium(text_encoders)
    pipe: Any = StableDiffusion3Pipeline(
        **parts,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        tokenizer=clip_tokenizer(CLIP_TOKENS),
        tokenizer_2=clip_tokenizer(CLIP_TOKENS),
        tokenizer_3=t5_tokenizer(),
    )
    pipe.save_pretrained(folder)
    return Path(folder)


def build_flux_dev(
    folder: str | Path, *, text_encoders: TextEncoders = "small", dtype: Dtype = "bfloat16", device: str = "cpu", seed: int = 0
) -> Path:
    """Save a random FLUX.1-dev (transformer: 11.9 B parameters) and return its folder: 23 GiB, 32 with full encoders.

    Parameters as in `build_sd35_medium`.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    with _drawing(dtype, device, seed):
        parts = _flux_dev(text_encoders)
    pipe: Any = FluxPipeline(
        **parts,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        tokenizer=clip_tokenizer(CLIP_TOKENS),
        tokenizer_2=t5_tokenizer(),
    )
    pipe.save_pretrained(folder)
    return Path(folder)


def parameter_counts(model: Literal["sd35_medium", "flux_dev"], *, text_encoders: TextEncoders = "full") -> dict[str, int]:
    """Parameters of each part of the pipeline, counted without giving them memory.

    On top of SD3.5's come the positions, a table of 384^2 x 1536 = 0.23 B numbers.
    """
    with torch.device("meta"):
        parts = {"sd35_medium": _sd35_medium, "flux_dev": _flux_dev}[model](text_encoders)
    return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}


def sizes(bytes_per_parameter: int = 2) -> None:
    """Print parameters and GiB of every part of both pipelines."""
    for model in ("sd35_medium", "flux_dev"):
        for name, count in parameter_counts(model).items():
            print(f"{model:12} {name:15} {count / 1e9:7.3f} B {count * bytes_per_parameter / 2**30:7.2f} GiB")


def _sd35_medium(text_encoders: TextEncoders) -> Sizes:
    from diffusers import AutoencoderKL, SD3Transformer2DModel

    return {
        "transformer": SD3Transformer2DModel(**SD35_MEDIUM),
        "vae": AutoencoderKL(**VAE, **SD35_LATENTS),
        "text_encoder": clip_encoder(CLIP_L, text_encoders, projection=True),
        "text_encoder_2": clip_encoder(CLIP_G, text_encoders, projection=True),
        "text_encoder_3": t5_encoder(text_encoders),
    }


def _flux_dev(text_encoders: TextEncoders) -> Sizes:
    from diffusers import AutoencoderKL, FluxTransformer2DModel

    return {
        "transformer": FluxTransformer2DModel(**FLUX_DEV),
        "vae": AutoencoderKL(**VAE, **FLUX_LATENTS),
        "text_encoder": clip_encoder(CLIP_L, text_encoders, projection=False),
        "text_encoder_2": t5_encoder(text_encoders),
    }


def clip_encoder(published: Sizes, size: TextEncoders, *, projection: bool) -> nn.Module:
    """start 512 and end 513 are the ids of the miniatures' tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    smaller = {"vocab_size": 514, "num_hidden_layers": 2, "intermediate_size": published["hidden_size"]} if size == "small" else {}
    ids = {"bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
    config = CLIPTextConfig(**published | smaller | ids, max_position_embeddings=CLIP_TOKENS)
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def t5_encoder(size: TextEncoders) -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    smaller = {"vocab_size": 98, "num_layers": 1, "num_heads": 2, "d_ff": 512} if size == "small" else {}
    return T5EncoderModel(T5Config(**T5_XXL | smaller, feed_forward_proj="gated-gelu")).eval()


@contextmanager
def _drawing(dtype: Dtype, device: str, seed: int) -> Iterator[None]:
    """Inside it new modules are drawn from `seed`, in `dtype`, on `device`."""
    before = torch.get_default_dtype()
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        torch.set_default_dtype(getattr(torch, dtype))
        try:
            yield
        finally:
            torch.set_default_dtype(before)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli({"sd35_medium": build_sd35_medium, "flux_dev": build_flux_dev, "sizes": sizes}, as_positional=True)
