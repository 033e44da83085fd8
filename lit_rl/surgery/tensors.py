"""Tensors that stay on the disk until each is asked for: of safetensors files, and of checkpoints, FSDP2's and ZeRO's folders included."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lit_rl.checkpoints.contents import with_nan
from lit_rl.checkpoints.deepgen_tensors import REFERENCE
from lit_rl.checkpoints.manifest import file_damage
from lit_rl.checkpoints.restricted import METADATA_FILE, deepspeed_reads_plain_files, load_file, load_shards, read_metadata
from lit_rl.errors import ConfigError

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
"""The names that safetensors files have for precisions."""
POLICY = re.compile(r"^(?:_forward_module\.)?policy\.network\.")


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

    def renamed(self, names: Mapping[str, str]) -> Tensors:
        """The tensors that `names` has, under the names that it gives them."""
        old = {new: name for name, new in names.items()}
        return Tensors(self.place, {new: self.facts[name] for new, name in old.items()}, lambda name: self.read(old[name]))


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


def of_checkpoint(place: Path) -> Tensors:
    """The weights of the policy's network in a checkpoint, without frozen copies and without the beginnings of their names.

    place: a .ckpt file, a folder of FSDP2's, one of DeepSpeed's. Nothing in it is executed. Raises ConfigError for what is no checkpoint.
    """
    found = _of_folder(place) if place.is_dir() else _of_file(place)
    names = {name: POLICY.sub("", name) for name in found.facts if POLICY.match(name) and not REFERENCE.search(name)}
    if not names:
        raise ConfigError(f"{place} holds no weights of a policy: it is no checkpoint of a run here")
    return found.renamed(names)


def _of_file(file: Path) -> Tensors:
    if damage := file_damage(file):
        raise ConfigError(f"{file} {damage}")
    found = load_file(file, mmap=True)
    state = found.get("state_dict") if isinstance(found, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ConfigError(f"{file} is no checkpoint of a run: it has no state_dict of tensors")
    return _of_state(file, state)


def _of_state(place: Path, state: Mapping[str, Tensor]) -> Tensors:
    return Tensors(place, {name: Facts(tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}, lambda name: state[name])


def _of_folder(folder: Path) -> Tensors:
    return _of_fsdp2(folder) if (folder / METADATA_FILE).is_file() else _of_zero(folder)


def _of_fsdp2(folder: Path) -> Tensors:
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    begins = "state_dict."
    stored = {name: entry for name, entry in read_metadata(folder).state_dict_metadata.items() if name.startswith(begins)}
    facts = {
        name.removeprefix(begins): Facts(tuple(entry.size), entry.properties.dtype)
        for name, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata)
    }

    def read(name: str) -> Tensor:
        state = {begins + name: torch.empty(facts[name].shape, dtype=facts[name].dtype)}
        load_shards(state, folder)
        return state[begins + name]

    return Tensors(folder, facts, read)


def _of_zero(folder: Path) -> Tensors:
    """DeepSpeed's own reader puts one tensor after the other together; its flat groups of all weights in float32 stay in memory."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    try:
        with deepspeed_reads_plain_files():
            state = get_fp32_state_dict_from_zero_checkpoint(os.fspath(folder), lazy_mode=True)
    except (FileNotFoundError, ValueError, KeyError) as error:
        raise ConfigError(f"{folder} is not a whole DeepSpeed folder: {error}") from error
    facts = {name: Facts(tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}
    return Tensors(folder, facts, lambda name: state[name].contiguous())
