"""Checkpoints of DeepGen (deepgenteam/deepgen_rl): a flat dict of tensors under the names that its trainer gave them.

| names                                   | contents                                                                          |
| --- | --- |
| `transformer.*`                         | SD3.5's transformer under diffusers' names                                        |
| `connector.*`, `projector_{1,2,3}.*`    | the bridge from the language model to the transformer                             |
| `meta_queries`                          | its learned queries                                                               |
| `lmm.*`                                 | Qwen2.5-VL under the names of transformers 4.51, its adapter (`lora_A`, `lora_B`) |

A file before RL has all of them; what RL writes leaves `lmm.*` out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lit_rl.checkpoints.tensors import deepspeed_shapes, is_deepspeed, open_weights
from lit_rl.errors import ConfigError, listed

Tensors = dict[str, Tensor]

BRIDGE = re.compile(r"meta_queries|(connector|projector_[123])\..+")
ASIDE = re.compile(r"(lmm\.(visual|lm_head)|vae|ema)\..+")
"""Names of what no text prompt meets, or what is read from its own folder."""


@dataclass
class DeepGenWeights:
    """The content of a file: each part's tensors under its own names, without the part's prefix; `language` is the text decoder."""

    transformer: Tensors = field(default_factory=dict)
    bridge: Tensors = field(default_factory=dict)
    language: Tensors = field(default_factory=dict)
    aside: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


def old_name(name: str) -> str:
    """A name as DeepGen's loader has it: wrappers stripped, the language model's parts as transformers 4.51 named them."""
    name = name.removeprefix("module.").removeprefix("model.")
    name = re.sub(r"^lmm\.model\.visual\.", "lmm.visual.", name)
    return re.sub(r"^lmm\.model\.language_model\.", "lmm.model.", name)


def new_name(name: str) -> str:
    """The inverse of `old_name` for the language model: its parts as transformers 4.52 and later name them."""
    name = re.sub(r"^lmm\.visual\.", "lmm.model.visual.", name)
    return re.sub(r"^lmm\.model\.(?!visual\.|language_model\.)", "lmm.model.language_model.", name)


def split_parts(state: Mapping[str, Tensor]) -> DeepGenWeights:
    """The tensors of a checkpoint by part, whichever wrappers and version of transformers its names are of."""
    parts = DeepGenWeights()
    for name, tensor in ((old_name(name), tensor) for name, tensor in state.items()):
        if name.startswith("transformer."):
            parts.transformer[name.removeprefix("transformer.")] = tensor
        elif BRIDGE.fullmatch(name):
            parts.bridge[name] = tensor
        elif name.startswith("lmm.model."):
            parts.language[name.removeprefix("lmm.model.")] = tensor
        else:
            (parts.aside if ASIDE.fullmatch(name) else parts.unknown).append(name)
    return parts


def read_deepgen(path: str | Path, *, sizes: bool = False) -> Tensors:
    """The tensors of a checkpoint, on the CPU, under `old_name`. Nothing in the file is executed.

    path: A file or folder that `open_weights` reads. sizes: Tensors of the meta device, for which no numbers are read. Raises ConfigError
    for anything else, for what is not whole, and for a checkpoint with NaN in it.
    """
    place = Path(path).expanduser()
    try:
        found = _sizes(place) if sizes else open_weights(place).numbers()
    except ConfigError as error:
        raise ConfigError(f"checkpoint: {error}") from error
    if not found:
        raise ConfigError(f"checkpoint: {str(path)!r} holds no weights")
    return {old_name(name): tensor for name, tensor in found.items()}


def _sizes(place: Path) -> Tensors:
    if place.is_dir() and is_deepspeed(place) and not any(place.glob("*.safetensors")):
        return {name: torch.empty(shape, device="meta") for name, shape in deepspeed_shapes(place).items()}
    return {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in open_weights(place).facts.items()}


def check_checkpoint(path: str | Path) -> Path:
    """The checkpoint's path. Raises ConfigError where there is none, or a folder without weights."""
    place = Path(path).expanduser()
    if not place.exists():
        raise ConfigError(f"checkpoint: no such file or folder {str(path)!r}")
    if place.is_dir() and not (any(place.glob("*.safetensors")) or is_deepspeed(place)):
        there = ", ".join(sorted(child.name for child in place.iterdir())[:8]) or "nothing"
        raise ConfigError(f"checkpoint: {str(path)!r} has neither *.safetensors nor DeepSpeed's *_model_states.pt, found {there}")
    return place


def check_whole(stored: Iterable[str], wanted: Iterable[str], *, what: str) -> None:
    """Raise ConfigError that lists names which are missing or unknown. what: How the message begins."""
    have, need = set(stored), set(wanted)
    missing, unknown = sorted(need - have), sorted(have - need)
    if missing or unknown:
        both = (("missing", missing), ("unknown", unknown))
        raise ConfigError(f"{what}: " + "; ".join(f"{len(names)} {word}: {listed(names)}" for word, names in both if names))
