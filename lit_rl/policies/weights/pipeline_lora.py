"""Adapters of image pipelines: files as stock diffusers reads and writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from lit_rl.checkpoints.weights import read_tensors
from lit_rl.errors import ConfigError, listed
from lit_rl.policies.pretrained import Pipeline
from lit_rl.policies.weights.adapters import TRAINED, adapter_parameters, lora_config, to_float32, tuner_layers
from lit_rl.policies.weights.lora import LoraSettings, check_initial, check_plain, linear_names, started_from

FILE = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"
PREFIX = "transformer."
OTHERS = ("dora_scale", "lora_magnitude_vector", "lokr_", "hada_", "lora_te", "text_encoder", "lora_B.bias", "norm_q", "norm_k")
"""In the names of tensors that are no low-rank matrix of the transformer, and that a stock pipeline applies elsewhere or drops."""


def split_adapter(pretrained: str, lora: LoraSettings | None) -> tuple[str, LoraSettings | None]:
    """(base, settings) of a `pretrained` that is the folder of an adapter of ours: its base, and settings that start from it.

    Anything else comes back as it is. Raises ConfigError where the adapter names no base, or none is to be trained.
    """
    folder = Path(pretrained).expanduser()
    if (folder / "model_index.json").is_file() or not folder.is_dir() or not any(folder.glob("*lora*.safetensors")):
        return pretrained, lora
    base = str(adapter_metadata(adapter_file(folder)).get("base_model_name_or_path") or "")
    if not base:
        raise ConfigError(f"pretrained: {pretrained!r} is a LoRA adapter that names no base: give the pipeline, and this as lora.initial")
    return base, started_from(pretrained, base, lora)[0]


def load_initial(pipe: Pipeline, lora: LoraSettings) -> None:
    """Freeze the pipeline's transformer and add the adapter of `lora.initial` as the trained one, with the effect that it has in stock
    diffusers: its own strengths and ranks, kohya's and xlabs' files too.

    Raises ConfigError for what is not plain LoRA of the transformer, does not fit it, or contradicts the settings.
    """
    file = adapter_file(Path(str(lora.initial)).expanduser())
    where, network = f"lora.initial: {str(file)!r}", pipe.transformer
    metadata = _check_file(file, where)
    before = {name: weight.shape for name, weight in network.named_parameters()}
    try:
        stored = pipe.lora_state_dict(str(file))
        pipe.load_lora_weights(str(file), adapter_name=TRAINED)
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        raise ConfigError(f"{where} is not read by diffusers for this {type(pipe).__name__}: {error}") from error
    found = {PREFIX + key for key in adapter_parameters(network, TRAINED)}
    if found != stored.keys() or not found:
        raise ConfigError(
            f"{where} is not an adapter of this transformer alone, as diffusers reads it: {len(found)} of its {len(stored)} tensors have "
            f"a place, and these have none: {listed(sorted(stored.keys() - found))}"
        )
    plain = {name.replace(".base_layer", ""): weight.shape for name, weight in network.named_parameters() if ".lora_" not in name}
    if plain != before:
        raise ConfigError(f"{where} widens a layer of the transformer (a control adapter), which is not supported")
    _take_over(network, lora, metadata)
    check_initial(network, lora, layers=None if lora.named is None else linear_names_of(network, lora.named))


def linear_names_of(network: nn.Module, targets: list[str]) -> set[str]:
    """Names of the linear layers that end in one of `targets`, in a network with adapters."""
    names = {name.removesuffix(".base_layer") for name in linear_names(network)}
    return {name for name in names if any(name == t or name.endswith("." + t) for t in targets)}


def _take_over(network: nn.Module, lora: LoraSettings, metadata: Mapping[str, object]) -> None:
    """Train what diffusers has read, and nothing else, with the dropout of the settings."""
    network.requires_grad_(False)
    for parameter in adapter_parameters(network, TRAINED).values():
        parameter.requires_grad_(True)
    to_float32(network, TRAINED)
    for layer in tuner_layers(network):
        layer.lora_dropout[TRAINED] = nn.Dropout(lora.dropout) if lora.dropout else nn.Identity()
    config = lora_config(network)
    config.lora_dropout, config.inference_mode = lora.dropout, False


def adapter_file(path: Path) -> Path:
    """The file of tensors that diffusers takes from a path: the file itself, or the only one in a folder."""
    if path.is_file():
        return path
    if (path / FILE).is_file():
        return path / FILE
    found = sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        there = f"{len(found)} files of tensors: {listed([file.name for file in found])}" if found else "no file of tensors"
        raise ConfigError(f"lora.initial: {str(path)!r} has {there}; name the file, or call it {FILE}")
    return found[0]


def adapter_metadata(file: Path) -> dict[str, object]:
    """PEFT's configuration of the transformer's adapter as diffusers stores it in the file's header; empty where there is none."""
    from safetensors import SafetensorError, safe_open

    if file.suffix != ".safetensors":
        return {}
    try:
        with safe_open(file, "pt") as tensors:
            stored = json.loads((tensors.metadata() or {}).get(METADATA, "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise ConfigError(f"lora.initial: {str(file)!r} is not a whole file of tensors: {error}") from error
    return {key.removeprefix(PREFIX): value for key, value in stored.items() if key.startswith(PREFIX)}


def _check_file(file: Path, where: str) -> dict[str, object]:
    metadata = adapter_metadata(file)
    check_plain(metadata, where=repr(str(file)))
    names = list(read_tensors(file, what=where))
    others = [name for name in names if any(part in name for part in OTHERS)]
    if others:
        raise ConfigError(
            f"{where} holds more than low-rank matrices of the transformer: {listed(others)}; their part of its effect would be lost. "
            "Merge it into the pipeline with diffusers (load_lora_weights, fuse_lora, save_pretrained) and start from that"
        )
    return metadata


def save_adapter(network: nn.Module, folder: Path, weights: Mapping[str, Tensor], *, pipeline: type, base: str) -> None:
    """Write `weights`, named as the trained adapter's parameters in `network`, as stock `pipe.load_lora_weights(folder)` reads them.

    base: the pipeline that they belong to, for the header.
    """
    named = {key.replace(f".{TRAINED}.", "."): tensor for key, tensor in weights.items()}
    expected = adapter_parameters(network, TRAINED).keys()
    if named.keys() != expected:
        raise ConfigError(
            f"save: the adapter has {len(expected)} tensors, got {len(named)}, {len(named.keys() & expected)} of them its own"
        )
    # Without it alpha would be read as the rank.
    metadata = lora_config(network).to_dict() | {"base_model_name_or_path": base}
    pipeline.save_lora_weights(folder, transformer_lora_layers=named, transformer_lora_adapter_metadata=metadata)  # type: ignore[attr-defined]
