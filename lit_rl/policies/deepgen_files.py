"""Folders that DeepGen is read from, and the file that it is written to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lit_rl.checkpoints.deepgen import read_deepgen
from lit_rl.errors import ConfigError
from lit_rl.policies.conditioner import outer_name
from lit_rl.policies.language_model import read_lm
from lit_rl.policies.pretrained import Pipeline, check_components, without_bars
from lit_rl.policies.unread import leaves_weights, parts_of
from lit_rl.policies.weights.adapters import TRAINED

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRANSFORMER, PIPELINE, SCHEDULER = "SD3Transformer2DModel", "StableDiffusion3Pipeline", "FlowMatchEulerDiscreteScheduler"
EXPORT = "model.safetensors"


def check_sd3_folder(pretrained: str) -> Path | None:
    """The folder, None for a hub id. Raises ConfigError where transformer, VAE or scheduler are missing."""
    return check_components(pretrained, ("transformer", "vae", "scheduler"))


def read_transformer(where: str, *, dtype: torch.dtype, **source: str | None) -> nn.Module:
    """The stock class, whichever of its descendants the folder names: text to image needs no more."""
    import diffusers

    if leaves_weights():
        network = parts_of({"transformer": ("diffusers", TRANSFORMER)}, where, dtypes={"default": dtype}, **source)["transformer"]
        assert isinstance(network, nn.Module)
        return network
    without_bars()
    try:
        return getattr(diffusers, TRANSFORMER).from_pretrained(where, subfolder="transformer", torch_dtype=dtype, **source).eval()
    except OSError as error:
        raise ConfigError(f"pretrained: {where!r} is neither a folder nor a hub repository that can be read: {error}") from error


def read_sd3(where: str, transformer: nn.Module, *, vae_dtype: torch.dtype, **source: str | None) -> Pipeline:
    """A Stable Diffusion 3 pipeline around `transformer`, without text encoders."""
    import diffusers

    from lit_rl.miniatures.pixel_vae import PixelUnshuffleVAE

    kind = diffusers.AutoencoderKL.load_config(where, subfolder="vae", revision=source.get("revision")).get("_class_name")
    cls = PixelUnshuffleVAE if kind == PixelUnshuffleVAE.__name__ else diffusers.AutoencoderKL
    text = dict.fromkeys(f"{part}{n}" for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3"))
    if leaves_weights():
        named = {"vae": (cls.__module__, cls.__name__), "scheduler": ("diffusers", SCHEDULER)}
        return getattr(diffusers, PIPELINE)(
            transformer=transformer, **parts_of(named, where, dtypes={"default": vae_dtype}, **source), **text
        )
    vae = cls.from_pretrained(where, subfolder="vae", torch_dtype=vae_dtype, **source).requires_grad_(False)
    scheduler = getattr(diffusers, SCHEDULER).from_pretrained(where, subfolder="scheduler", revision=source.get("revision"))
    return getattr(diffusers, PIPELINE)(transformer=transformer, scheduler=scheduler, vae=vae, **text)


def read_language(where: str, *, dtype: torch.dtype) -> PreTrainedModel:
    """The text decoder of a vision-language model; what sees images is let go."""
    lm = read_lm(where, dtype=dtype, attention=None)
    decoder: PreTrainedModel | None = getattr(lm.base_model, "language_model", None)
    if decoder is None:
        raise ConfigError(f"language_model: {where!r} is a {type(lm).__name__}, which has no text decoder of its own: give a Qwen2.5-VL")
    return decoder


def write_export(
    folder: Path,
    weights: Mapping[str, Tensor],
    *,
    checkpoint: Path,
    pretrained: str,
    strengths: Mapping[str, float],
    **source: str | None,
) -> None:
    """Write what DeepGen's trainer writes, and what its converter and loader read: the whole model but the language model's base.

    weights: trained ones by their names in the policy. strengths: alpha / rank of the transformer's adapters by layer. The language model's
    adapter is in the file where it is trained; else that of the checkpoint goes on to count.
    """
    from safetensors.torch import save_file

    stored = read_deepgen(checkpoint)
    with_adapter = any(name.startswith("conditioner.language.") for name in weights)
    state = {n: t for n, t in stored.items() if not n.startswith(("lmm.", "vae.", "ema.")) or (with_adapter and ".lora_" in n)}
    if not any(name.startswith("transformer.") for name in state):
        own = read_transformer(pretrained, dtype=torch.float32, **source).state_dict()
        state |= {f"transformer.{name}": tensor for name, tensor in own.items()}
    state |= {_outer(name): tensor for name, tensor in weights.items() if not (name.startswith("network.") and ".lora_" in name)}
    for layer, strength in strengths.items():
        down, up = (weights.get(f"network.{layer}.lora_{side}.{TRAINED}.weight") for side in "AB")
        if down is not None and up is not None:
            base = state[f"transformer.{layer}.weight"]
            state[f"transformer.{layer}.weight"] = base.float() + strength * up.float().cpu() @ down.float().cpu()
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, folder / EXPORT)


def _outer(name: str) -> str:
    """A parameter of the policy under DeepGen's name."""
    for inner, outer in (("network.", "transformer."), ("conditioner.language.", "lmm.model.")):
        if name.startswith(inner):
            return outer + name.removeprefix(inner)
    return outer_name(name.removeprefix("conditioner.bridge."))
