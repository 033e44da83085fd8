"""The weights of a checkpoint, whatever they were saved as. Tensors stay on the disk until each is asked for, and nothing is executed."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_rl.checkpoints.contents import with_nan
from lit_rl.checkpoints.manifest import file_damage
from lit_rl.checkpoints.restricted import ANOTHER, METADATA_FILE, deepspeed_reads_plain_files, load_file, load_shards, read_metadata
from lit_rl.errors import ConfigError, listed

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
"""The names that safetensors files have for precisions."""


class Facts(NamedTuple):
    """The shape and precision of a tensor that has not been read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Tensors:
    """The tensors of one input by name.

    read: Returns one of them, on the CPU; nobody else holds it.
    """

    place: Path
    facts: Mapping[str, Facts]
    read: Callable[[str], Tensor]

    def number(self, name: str) -> Tensor:
        """A tensor of numbers. Raises ConfigError where it holds NaN."""
        found = self.read(name)
        if with_nan([(name, found)]):
            raise ConfigError(f"{self.place} holds NaN in {name}: training had failed when it was written, use an earlier one")
        return found

    def numbers(self) -> dict[str, Tensor]:
        """All of them by name, those of files still on the disk. Raises ConfigError where one holds NaN."""
        return {name: self.number(name) for name in self.facts}

    def renamed(self, names: Mapping[str, str]) -> Tensors:
        """The tensors that `names` has, under the names that it gives them."""
        old = {new: name for name, new in names.items()}
        return Tensors(self.place, {new: self.facts[name] for new, name in old.items()}, lambda name: self.read(old[name]))


def open_weights(place: Path) -> Tensors:
    """The weights of a file or folder by the names that they have there.

    place: A .safetensors file; a file that torch has saved, flat or with "state_dict"; a folder with model.safetensors, with all shards of
    one, with FSDP2's shards or DeepSpeed's. Raises ConfigError for anything else and for what is not whole.
    """
    if not place.exists():
        raise ConfigError(f"no such checkpoint: {place}")
    if not place.is_dir():
        return of_safetensors(place, {"": [place]}) if place.suffix == ".safetensors" else _of_file(place)
    whole = place / "model.safetensors"
    if files := [whole] if whole.is_file() else shard_files(place):
        return of_safetensors(place, {"": files})
    if (place / METADATA_FILE).is_file():
        return _of_fsdp2(place)
    if is_deepspeed(place):
        return _of_deepspeed(place)
    there = ", ".join(sorted(child.name for child in place.iterdir())[:8]) or "nothing"
    raise ConfigError(f"{place} has neither *.safetensors nor FSDP2's .metadata nor DeepSpeed's *_model_states.pt, found {there}")


def is_deepspeed(folder: Path) -> bool:
    """True for a folder of DeepSpeed's, or one above it that names it in `latest`."""
    return (folder / "latest").is_file() or any(folder.glob("*model_states.pt"))


def of_safetensors(place: Path, files: Mapping[str, Sequence[Path]]) -> Tensors:
    """The tensors of files by the prefix that their names get. Raises ConfigError for a damaged file or a name that comes twice."""
    from safetensors import SafetensorError, safe_open

    facts: dict[str, Facts] = {}
    where: dict[str, tuple[Callable[[str], Tensor], str]] = {}
    for prefix, file in [(prefix, file) for prefix, some in files.items() for file in some]:
        if damage := file_damage(file):
            raise ConfigError(f"{file} {damage}")
        try:
            stored = safe_open(file, "pt")
            for name in stored.keys():  # noqa: SIM118
                cut = stored.get_slice(name)
                if prefix + name in facts:
                    raise ConfigError(f"{file} holds {name}, which an earlier shard holds too: one of them would be lost")
                facts[prefix + name] = Facts(tuple(cut.get_shape()), DTYPES[cut.get_dtype()])
                where[prefix + name] = stored.get_tensor, name
        except (SafetensorError, KeyError) as error:
            raise ConfigError(f"{file} is not a file of tensors, or not a whole one ({error})") from error
    return Tensors(place, facts, lambda name: where[name][0](where[name][1]))


def _of_file(file: Path) -> Tensors:
    if damage := file_damage(file):
        raise ConfigError(f"{file} {damage}")
    found = load_file(file, mmap=True, advice=ANOTHER)
    found = found["state_dict"] if isinstance(found, Mapping) and "state_dict" in found else found
    if not isinstance(found, Mapping):
        raise ConfigError(f"{file} holds a {type(found).__name__}, not tensors by name")
    if odd := [str(name) for name, value in found.items() if not isinstance(value, Tensor)]:
        raise ConfigError(f"{file} is not a file of tensors by name: {listed(odd)} would be lost")
    state: dict[str, Tensor] = {str(name): tensor for name, tensor in found.items()}
    return Tensors(file, {name: Facts(tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}, state.__getitem__)


def _of_fsdp2(folder: Path) -> Tensors:
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    begins, index = "state_dict.", read_metadata(folder)
    facts = {
        name.removeprefix(begins): Facts(tuple(entry.size), entry.properties.dtype)
        for name, entry in index.state_dict_metadata.items()
        if name.startswith(begins) and isinstance(entry, TensorStorageMetadata)
    }

    def read(name: str) -> Tensor:
        state = {begins + name: torch.empty(facts[name].shape, dtype=facts[name].dtype)}
        load_shards(state, folder, index=index)
        return state[begins + name]

    return Tensors(folder, facts, read)


def _of_deepspeed(folder: Path) -> Tensors:
    """DeepSpeed's own reader puts one tensor after the other together; its flat groups of all weights in float32 stay in memory."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    above, tag = (folder, None) if (folder / "latest").is_file() else (folder.absolute().parent, folder.absolute().name)
    try:
        with deepspeed_reads_plain_files():
            state = get_fp32_state_dict_from_zero_checkpoint(os.fspath(above), tag, lazy_mode=True)
    except (FileNotFoundError, ValueError, KeyError) as error:
        raise ConfigError(f"{folder} is not a whole DeepSpeed folder: {error}") from error
    facts = {name: Facts(tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}
    return Tensors(folder, facts, lambda name: state[name].contiguous())


def deepspeed_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the trained weights in a DeepSpeed folder, which the first process's file names: no weight is read."""
    place = folder / (folder / "latest").read_text().strip() if (folder / "latest").is_file() else folder
    with deepspeed_reads_plain_files():
        found: Any = load_file(min(place.glob("*model_states.pt"), default=place), mmap=True)
    return {name: tuple(shape) for shapes in found["param_shapes"] for name, shape in shapes.items()}


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
