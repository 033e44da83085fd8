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

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_rl.checkpoints.restricted import deepspeed_reads_plain_files
from lit_rl.checkpoints.weights import check_numbers, read_plain, read_sizes
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

    path: A .pth or .safetensors file, flat or with "state_dict"; a folder with model.safetensors, whole or in shards; or a DeepSpeed
    folder. sizes: Tensors of the meta device, for which no numbers are read. Raises ConfigError for anything else, and for a checkpoint
    with NaN in it.
    """
    place = Path(path).expanduser()
    what = f"checkpoint: {str(path)!r}"
    read = read_sizes if sizes else read_plain
    found = _read_folder(place, what, read) if place.is_dir() else _flat(read(place, what=what))
    if not isinstance(found, Mapping) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise ConfigError(f"{what} is not a file of tensors by name, flat or under 'state_dict'")
    if not sizes:
        check_numbers(found, what=what)
    return {old_name(str(name)): tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}


def check_checkpoint(path: str | Path) -> Path:
    """The checkpoint's path. Raises ConfigError where there is none, or a folder without weights."""
    place = Path(path).expanduser()
    if not place.exists():
        raise ConfigError(f"checkpoint: no such file or folder {str(path)!r}")
    if place.is_dir() and not (_shards(place) or _is_deepspeed(place)):
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


def _flat(found: object) -> object:
    return found["state_dict"] if isinstance(found, Mapping) and "state_dict" in found else found


def _shards(folder: Path) -> list[Path]:
    """model.safetensors, or all files that it is cut into."""
    whole = folder / "model.safetensors"
    return [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))


def _is_deepspeed(folder: Path) -> bool:
    return any(folder.glob("*model_states.pt")) or (folder / "latest").is_file()


def _read_folder(folder: Path, what: str, read: Callable[..., object]) -> object:
    if files := _shards(folder):
        parts = [read(file, what=f"{what}, {file.name}") for file in files]
        return {name: tensor for part in parts if isinstance(part, Mapping) for name, tensor in part.items()}
    if read is read_sizes:
        return _deepspeed_sizes(folder, what)
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    above, tag = (folder, None) if (folder / "latest").is_file() else (folder.absolute().parent, folder.absolute().name)
    try:
        with deepspeed_reads_plain_files():
            return get_fp32_state_dict_from_zero_checkpoint(os.fspath(above), tag)
    except (FileNotFoundError, ValueError, KeyError) as error:
        raise ConfigError(f"{what} is not a whole DeepSpeed folder: {error}") from error


def _deepspeed_sizes(folder: Path, what: str) -> Tensors:
    """Tensors of the meta device for the trained weights of a DeepSpeed folder: the first process's file names their shapes."""
    place = folder / (folder / "latest").read_text().strip() if (folder / "latest").is_file() else folder
    with deepspeed_reads_plain_files():
        found: Any = read_sizes(min(place.glob("*model_states.pt"), default=place), what=what)
    return {name: torch.empty(shape, device="meta") for shapes in found["param_shapes"] for name, shape in shapes.items()}
