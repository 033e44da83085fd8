"""Reads the trained weights of a run of DeepGen, whatever they were saved as: tensors stay on the disk until they are used (`mmap`).

Names are the file's own where DeepGen's trainer or an export wrote it; those of this project's checkpoints become DeepGen's.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from lit_rl.checkpoints.contents import with_nan
from lit_rl.checkpoints.manifest import file_damage
from lit_rl.checkpoints.restricted import METADATA_FILE, deepspeed_reads_plain_files, load_file, load_shards, read_metadata
from lit_rl.errors import ConfigError, listed

Tensors = dict[str, Tensor]

OURS = {
    "network.": "transformer.",
    "conditioner.bridge.queries.weight": "meta_queries",
    "conditioner.bridge.": "",
    "conditioner.language.": "lmm.model.",
}
"""Beginnings of the policy's names, and what DeepGen has in their place."""
REFERENCE = re.compile(r"reference_network\.|conditioner\.frozen\.|\.lora_\w+\.reference\b|\.lora_\w+\.frozen\b")
"""Frozen copies of what is trained."""


def rl_tensors(place: Path) -> Tensors:
    """The tensors of a checkpoint by name. Nothing in it is executed.

    place: a .safetensors file, a file that torch has saved (flat or with "state_dict", or this project's .ckpt); a folder with
    model.safetensors, with all shards of one, with FSDP2's shards or DeepSpeed's. DeepSpeed's and FSDP2's are put together in memory.
    Raises ConfigError for anything else, for what is not whole, for NaN, and for weights that DeepGen's file has no place for.
    """
    if not place.exists():
        raise ConfigError(f"no such checkpoint: {place}")
    found = _of_folder(place) if place.is_dir() else _of_file(place)
    if odd := [name for name, value in found.items() if not isinstance(value, Tensor)]:
        raise ConfigError(f"{place} is not a file of tensors by name: {listed(list(map(str, odd)))} would be lost")
    tensors = {str(name): value for name, value in found.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ConfigError(f"{place} holds no weights")
    for name, tensor in tensors.items():
        if with_nan([(name, tensor)]):
            raise ConfigError(f"{place} holds NaN in {name}: training had failed when it was written, use an earlier one")
    return _theirs(tensors, place) if any(re.match(r"(_forward_module\.)?policy\.", name) for name in tensors) else tensors


def _of_file(file: Path) -> Mapping[str, object]:
    if damage := file_damage(file):
        raise ConfigError(f"{file} {damage}")
    if file.suffix == ".safetensors":
        return _of_safetensors([file])
    found = load_file(file, mmap=True)
    found = found["state_dict"] if isinstance(found, Mapping) and "state_dict" in found else found
    if not isinstance(found, Mapping):
        raise ConfigError(f"{file} holds a {type(found).__name__}, not tensors by name")
    return found


def _of_folder(folder: Path) -> Mapping[str, object]:
    if (folder / "model.safetensors").is_file():
        return _of_file(folder / "model.safetensors")
    if shards := shard_files(folder):
        return _of_safetensors(shards)
    if (folder / METADATA_FILE).is_file():
        return _of_fsdp2(folder)
    if (folder / "latest").is_file() or any(folder.glob("*model_states.pt")):
        return _of_deepspeed(folder)
    there = ", ".join(sorted(child.name for child in folder.iterdir())[:8]) or "nothing"
    raise ConfigError(f"{folder} has neither *.safetensors nor FSDP2's .metadata nor DeepSpeed's *_model_states.pt, found {there}")


def shard_files(folder: Path) -> list[Path]:
    """All files of a model that is cut into shards. Raises ConfigError where one is missing or others are there."""
    files = sorted(folder.glob("*.safetensors"))
    for index in folder.glob("*.safetensors.index.json"):
        wanted = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if missing := [name for name in wanted if not (folder / name).is_file()]:
            raise ConfigError(f"{folder} lacks {listed(missing)}, which {index.name} names: its weights would be lost")
        return [folder / name for name in wanted]
    if len(files) < 2:
        return files
    parts = [re.fullmatch(r"(.+)-(\d+)-of-(\d+)\.safetensors", file.name) for file in files]
    kinds = {part and (part[1], int(part[3])) for part in parts}
    if None in kinds or len(kinds) > 1:
        raise ConfigError(f"{folder} holds {listed([file.name for file in files])}, which are not shards of one model: name the file")
    numbers = {int(part[2]) for part in parts if part}
    count = next(int(part[3]) for part in parts if part)
    if missing := [str(number) for number in range(1, count + 1) if number not in numbers]:
        raise ConfigError(f"{folder} lacks shard {', '.join(missing)} of {count}: its weights would be lost")
    return files


def _of_safetensors(files: Iterable[Path]) -> Tensors:
    from safetensors import SafetensorError, safe_open

    found: Tensors = {}
    for file in files:
        if damage := file_damage(file):
            raise ConfigError(f"{file} {damage}")
        try:
            with safe_open(file, "pt") as stored:
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ConfigError(f"{file} is not a file of tensors, or not a whole one ({error})") from error
        if twice := [name for name in tensors if name in found]:
            raise ConfigError(f"{file} holds {listed(twice)}, which an earlier shard holds too: one of them would be lost")
        found |= tensors
    return found


def _of_fsdp2(folder: Path) -> Tensors:
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    begins, entries = "state_dict.", read_metadata(folder).state_dict_metadata
    weights = {name: entry for name, entry in entries.items() if name.startswith(begins) and isinstance(entry, TensorStorageMetadata)}
    state = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in weights.items()}
    load_shards(state, folder)
    return {name.removeprefix(begins): tensor for name, tensor in state.items()}


def _of_deepspeed(folder: Path) -> Tensors:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    above, tag = (folder, None) if (folder / "latest").is_file() else (folder.absolute().parent, folder.absolute().name)
    try:
        with deepspeed_reads_plain_files():
            state: Tensors = get_fp32_state_dict_from_zero_checkpoint(os.fspath(above), tag)
            return state
    except (FileNotFoundError, ValueError, KeyError) as error:
        raise ConfigError(f"{folder} is not a whole DeepSpeed folder: {error}") from error


def _theirs(tensors: Tensors, place: Path) -> Tensors:
    """Weights of this project's checkpoint under DeepGen's names, without frozen copies."""
    kept = {re.sub(r"^(_forward_module\.)?(policy\.)?", "", name): tensor for name, tensor in tensors.items() if not REFERENCE.search(name)}
    if adapters := [name for name in kept if name.startswith("network.") and ".lora_" in name]:
        raise ConfigError(
            f"{place} holds adapters of the transformer ({listed(adapters)}), and not what they are added to: convert an export of the run "
            "(callbacks.export.Export), in which they are merged"
        )
    found: Tensors = {}
    for name, tensor in kept.items():
        begins = next((own for own in OURS if name.startswith(own)), None)
        if begins is None:
            raise ConfigError(f"{place} holds {name}, which DeepGen's file has no place for: it would be lost")
        found[OURS[begins] + name.removeprefix(begins)] = tensor
    return found
