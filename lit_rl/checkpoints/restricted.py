"""Checkpoints read without executing what they name: pickle, in which they are written, calls any function that a file asks for.

Files of plain types and tensors are read by `torch.load(weights_only=True)`. Two kinds of folders need more: FSDP2's `.metadata` is a
bare pickle of a few classes, and DeepSpeed's files hold a few classes of its own.
"""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from unittest.mock import patch

import torch

from lit_rl.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata
    from torch.distributed.checkpoint.planner import ReadItem

T = TypeVar("T")

METADATA_FILE = ".metadata"
_OF_METADATA = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "pathlib": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
}  # fmt: skip
"""Names by module that a `.metadata` may use: data classes, and constructors that do nothing but construct."""

_OF_DEEPSPEED = {
    "deepspeed.runtime.fp16.loss_scaler": ("LossScaler", "DynamicLossScaler"),
    "deepspeed.runtime.zero.config": ("ZeroStageEnum",),
    "deepspeed.utils.tensor_fragment": ("fragment_address",),
}


ANOTHER = "use another checkpoint"
OR_TRUST = f"{ANOTHER} (whoever trusts the one who wrote it can add --weights_only false)"
"""The advice to those who continue a run."""


def load_file(file: str | os.PathLike, *, trusted: bool = False, mmap: bool = False, advice: str = OR_TRUST) -> object:
    """`torch.load` onto the CPU of a file of plain types and tensors. trusted: of any, by executing what it names.

    mmap: Tensors stay on the disk, but for those of torch's older format. Raises ConfigError for a file that names more, which ends in
    `advice`, or that is not whole.
    """
    with named_errors(file, advice=advice):
        return torch.load(file, map_location="cpu", weights_only=not trusted, mmap=mmap and zipfile.is_zipfile(file))


@contextmanager
def named_errors(checkpoint: str | os.PathLike, *, advice: str = OR_TRUST) -> Iterator[None]:
    """Turns what torch raises of a file that cannot be read, each kind with an error of its own, into a ConfigError."""
    try:
        yield
    except (ConfigError, OSError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        raise ConfigError(_sentence(checkpoint, error, advice)) from error


def read_metadata(folder: str | os.PathLike) -> Metadata:
    """The index of an FSDP2 folder. Raises ConfigError when its `.metadata` names other classes or is damaged."""
    from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

    file = Path(folder) / METADATA_FILE
    with named_errors(file), open(file, "rb") as stream:
        found = _MetadataUnpickler(stream).load()
        if not isinstance(found, Metadata):
            raise ValueError(f"it holds a {type(found).__name__}")
        _check_places(found)
    if getattr(found, "storage_meta", None) is None:  # as written by older releases of torch
        found.storage_meta = StorageMeta()
    return found


def stored_shapes(folder: str | os.PathLike, prefix: str = "state_dict.") -> dict[str, list[int]]:
    """Shape by name of the tensors of an FSDP2 folder whose name begins with `prefix`, without it."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    entries = read_metadata(folder).state_dict_metadata
    return {
        name.removeprefix(prefix): list(entry.size)
        for name, entry in entries.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }


def load_shards(state: dict[str, T], folder: str | os.PathLike, *, trusted: bool = False, index: Metadata | None = None) -> None:
    """`torch.distributed.checkpoint.load`: fill the tensors of `state` in place, and replace its other values. Collective.

    trusted: Execute what the values that are not tensors name. index: What `read_metadata` has read, for those who load several times.
    Raises ConfigError on all processes if one cannot read its part.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint._nested_dict import set_element
    from torch.distributed.checkpoint.api import CheckpointException

    class Reader(dcp.FileSystemReader):
        def read_metadata(self, *args: object, **kwargs: object) -> Metadata:
            metadata = read_metadata(self.path) if index is None else index
            assert metadata.storage_meta is not None, "read_metadata fills it in"
            metadata.storage_meta.load_id = self.load_id
            return metadata

    class Planner(dcp.DefaultLoadPlanner):
        def load_bytes(self, read_item: ReadItem, value: BytesIO) -> None:
            """The stock one reads with `weights_only=False`."""
            plain = torch.load(value, map_location="cpu", weights_only=not trusted)
            set_element(self.original_state_dict, self.mappings[read_item.dest_index.fqn], plain)

    try:
        dcp.load(state, storage_reader=Reader(folder), planner=Planner())
    except CheckpointException as error:
        (rank, (cause, _)), *_ = sorted(error.failures.items())
        raise ConfigError(f"{_sentence(folder, cause, OR_TRUST)} (process {rank})") from error


@contextmanager
def deepspeed_reads_plain_files() -> Iterator[None]:
    """In this block DeepSpeed, which opens files in several places with `weights_only=False`, reads plain ones and its own few classes."""
    from importlib import import_module

    classes = [getattr(import_module(module), name) for module, names in _OF_DEEPSPEED.items() for name in names]
    load: Callable[..., object] = torch.load

    def restricted(file: str | os.PathLike, *args: object, **kwargs: object) -> object:
        with named_errors(file):
            return load(file, *args, **(kwargs | {"weights_only": True}))

    with torch.serialization.safe_globals(classes), patch.object(torch, "load", restricted):
        yield


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if name in _OF_METADATA.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"Unsupported global: GLOBAL {module}.{name}")


def _check_places(metadata: Metadata) -> None:
    """Files are beside `.metadata`, nowhere else on the machine."""
    if not isinstance(metadata.state_dict_metadata, Mapping) or not isinstance(metadata.storage_data, Mapping):
        raise ValueError("it has no entries")
    for place in metadata.storage_data.values():
        if Path(place.relative_path).name != place.relative_path:
            raise ValueError(f"it points to {place.relative_path!r}, outside of the folder")


def _sentence(checkpoint: str | os.PathLike, error: BaseException, advice: str) -> str:
    text = str(error)
    named = re.search(r"GLOBAL ([\w.]+)", text)
    if named:
        told = f"checkpoint {checkpoint} names {named[1]}, which would be executed and is nothing that a run stores, so it was not read"
        return f"{told}: {advice}"
    inner = re.search(r"WeightsUnpickler error: (.+)", text)  # torch goes on to recommend `weights_only=False`
    lines = [inner[1]] if inner else text.strip().splitlines()
    return f"checkpoint {checkpoint} cannot be read, it is damaged or of another kind: {type(error).__name__}: {lines[0] if lines else ''}"
