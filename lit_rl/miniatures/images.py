"""From-config miniatures of SD3 and FLUX pipelines and of a style encoder: random weights, own tokenizers, nothing downloaded.

    python -m lit_rl.miniatures.images sd3 FOLDER [--seed 0 --hidden 128 --layers 4 ...]

The text encoders are random and stay so: their token embeddings have unit variance and their blocks add little to them, so a
conditioning token says which character stands where, which is all a transformer needs to learn to render it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from lit_rl.miniatures.text_encoders import clip_encoder, clip_tokenizer, t5_encoder, t5_tokenizer

VaeKind = Literal["pixel", "kl"]


def build_sd3(
    folder: str | Path,
    *,
    height: int = 16,
    width: int = 32,
    factor: int = 2,
    image_channels: Literal[1, 3] = 1,
    vae: VaeKind = "pixel",
    patch_size: int = 2,
    hidden: int = 128,
    heads: int = 4,
    layers: int = 4,
    qk_norm: str | None = "rms_norm",
    dual_attention_layers: Sequence[int] = (),
    text_hidden: int = 64,
    text_length: int = 24,
    t5_hidden: int | None = 128,
    shift: float = 3.0,
    scaling_factor: float = 1.0,
    shift_factor: float = 0.0,
    seed: int = 0,
) -> Path:
    """Save a random Stable Diffusion 3 pipeline for images of `height` x `width` pixels and return its folder.

    factor: pixels per latent cell (a power of 2); a latent has image_channels * factor^2 channels ("pixel") or 4 ("kl", AutoencoderKL).
    patch_size: latent cells per token.
    text_hidden: width of each of the two CLIP encoders; text_length: their context in tokens (one per character, plus two).
    t5_hidden: width of the T5 encoder, at least 2 * text_hidden; None leaves text_encoder_3 out (the policy
        copes; `from_pretrained` by hand then wants text_encoder_3=None, tokenizer_3=None).
    shift: of the sigma schedule. scaling_factor, shift_factor: latents are (pixels - shift) * scaling.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    _check_size(height, width, cell=factor * patch_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        autoencoder = _autoencoder(vae, factor, image_channels, scaling_factor, shift_factor)
        channels, side = autoencoder.config.latent_channels, max(height, width) // factor
        sizes = {"sample_size": side, "patch_size": patch_size, "pos_embed_max_size": side // patch_size}
        sizes |= {"in_channels": channels, "out_channels": channels, "num_layers": layers, "num_attention_heads": heads}
        sizes |= {"attention_head_dim": hidden // heads, "caption_projection_dim": hidden, "pooled_projection_dim": 2 * text_hidden}
        sizes |= {"joint_attention_dim": _sd3_width(text_hidden, t5_hidden)}
        transformer = SD3Transformer2DModel(**sizes, dual_attention_layers=tuple(dual_attention_layers), qk_norm=qk_norm)
        pipe = StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
            vae=autoencoder,
            **_sd3_text(text_hidden, text_length, t5_hidden),
        )
    return _saved(pipe, folder)


def build_flux(
    folder: str | Path,
    *,
    height: int = 16,
    width: int = 32,
    factor: int = 2,
    image_channels: Literal[1, 3] = 1,
    vae: VaeKind = "pixel",
    hidden: int = 128,
    heads: int = 4,
    layers: int = 2,
    single_layers: int = 2,
    fill: bool = False,
    guidance_embeds: bool = True,
    text_hidden: int = 64,
    text_length: int = 24,
    t5_hidden: int = 64,
    scaling_factor: float = 1.0,
    shift_factor: float = 0.0,
    seed: int = 0,
) -> Path:
    """Save a random FLUX.1 pipeline for images of `height` x `width` pixels and return its folder. Parameters as in `build_sd3`.

    fill: a FLUX.1-Fill pipeline, whose tokens carry the masked image and the mask as well.
    guidance_embeds: True for the kind of FLUX.1-dev (embedded guidance, resolution-dependent shift), False for that of schnell.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxFillPipeline, FluxPipeline, FluxTransformer2DModel

    _check_size(height, width, cell=2 * factor)
    head = hidden // heads
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        autoencoder = _autoencoder(vae, factor, image_channels, scaling_factor, shift_factor)
        channels = autoencoder.config.latent_channels
        sizes = {"in_channels": 4 * (2 * channels + factor**2) if fill else 4 * channels, "out_channels": 4 * channels}
        sizes |= {"num_layers": layers, "num_single_layers": single_layers, "num_attention_heads": heads, "attention_head_dim": head}
        sizes |= {"joint_attention_dim": t5_hidden, "pooled_projection_dim": text_hidden}
        axes = (head // 4, head // 8 * 3, head - head // 4 - head // 8 * 3)
        transformer = FluxTransformer2DModel(**sizes, guidance_embeds=guidance_embeds, axes_dims_rope=axes)
        pipe = (FluxFillPipeline if fill else FluxPipeline)(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0 if guidance_embeds else 1.0, use_dynamic_shifting=guidance_embeds),
            vae=autoencoder,
            text_encoder=clip_encoder(text_hidden, text_length, projection=False),
            tokenizer=clip_tokenizer(text_length),
            text_encoder_2=t5_encoder(t5_hidden),
            tokenizer_2=t5_tokenizer(),
        )
    return _saved(pipe, folder)


def build_siglip(
    folder: str | Path,
    *,
    side: int = 16,
    patch_size: int = 4,
    hidden: int = 64,
    heads: int = 2,
    layers: int = 2,
    seed: int = 0,
) -> Path:
    """Save a random SigLIP vision encoder for square images of `side` pixels and return its folder.

    Its pooled features, `hidden` wide, tell colours apart, and so inks, whatever is written in them.
    """
    from transformers import SiglipVisionConfig, SiglipVisionModel

    _check_size(side, side, cell=patch_size)
    config = SiglipVisionConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=side,
        patch_size=patch_size,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        SiglipVisionModel(config).save_pretrained(folder)
    return Path(folder)


def _sd3_width(text_hidden: int, t5_hidden: int | None) -> int:
    """Width of the text that the transformer attends to: that of T5, or of the two CLIP encoders side by side."""
    if t5_hidden and t5_hidden < 2 * text_hidden:
        raise ValueError(f"t5_hidden={t5_hidden} is narrower than the two CLIP encoders together: set it to at least {2 * text_hidden}")
    return t5_hidden or 2 * text_hidden


def _sd3_text(hidden: int, length: int, t5_hidden: int | None) -> dict[str, object]:
    return {
        "text_encoder": clip_encoder(hidden, length, projection=True),
        "tokenizer": clip_tokenizer(length),
        "text_encoder_2": clip_encoder(hidden, length, projection=True),
        "tokenizer_2": clip_tokenizer(length),
        "text_encoder_3": t5_encoder(t5_hidden) if t5_hidden else None,
        "tokenizer_3": t5_tokenizer() if t5_hidden else None,
    }


def _saved(pipe: Any, folder: str | Path) -> Path:
    pipe.save_pretrained(folder)
    return Path(folder)


def _check_size(height: int, width: int, *, cell: int) -> None:
    if height % cell or width % cell:
        raise ValueError(f"{height} x {width} pixels do not divide into tokens of {cell} x {cell}; choose multiples of {cell}")


def _autoencoder(kind: VaeKind, factor: int, image_channels: int, scaling_factor: float, shift_factor: float) -> Any:
    from diffusers import AutoencoderKL

    from lit_rl.miniatures.pixel_vae import PixelUnshuffleVAE

    levels = factor.bit_length()
    if factor != 2 ** (levels - 1):
        raise ValueError(f"factor={factor} is not a power of 2")
    if kind == "pixel":
        return PixelUnshuffleVAE(
            image_channels=image_channels,
            latent_channels=image_channels * factor**2,
            block_out_channels=(1,) * levels,
            scaling_factor=scaling_factor,
            shift_factor=shift_factor,
        )
    return AutoencoderKL(
        latent_channels=4,
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=4,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli({"sd3": build_sd3, "flux": build_flux, "siglip": build_siglip}, as_positional=True)
