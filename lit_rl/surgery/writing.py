"""safetensors files written tensor by tensor: the header first, since shapes are known, then each tensor as soon as it is computed.

The library's own `save_file` wants all tensors of a file at once. Format: 8 bytes with the header's length, a JSON header, the bytes.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from lit_rl.checkpoints.tensors import DTYPES, Facts

SHARD = 5 * 10**9
"""Bytes of a file, as transformers and diffusers cut models."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_file(file: Path, facts: Mapping[str, Facts], tensor: Callable[[str], Tensor], *, metadata: Mapping[str, str]) -> None:
    """Write the tensors of `facts`, asking `tensor` for each when its turn comes; of all of them one is in memory at a time."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, (shape, dtype) in facts.items():
        end = offset + facts[name].size
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(file, "wb") as stream:
        stream.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, (shape, dtype) in facts.items():
            found = tensor(name).to(dtype).contiguous()
            assert found.shape == shape, f"{name} has the shape {list(found.shape)}"
            stream.write(found.flatten().view(torch.uint8).numpy().data)


def write_shards(folder: Path, stem: str, facts: Mapping[str, Facts], tensor: Callable[[str], Tensor], *, shard: int = SHARD) -> None:
    """Write one file of a model, or several and their index, under the names that transformers and diffusers look for.

    stem: "model" or "diffusion_pytorch_model". shard: Bytes of a file; a larger tensor has a file of its own.
    """
    groups: list[dict[str, Facts]] = [{}]
    for name, about in facts.items():
        if groups[-1] and sum(other.size for other in groups[-1].values()) + about.size > shard:
            groups.append({})
        groups[-1][name] = about
    if len(groups) == 1:
        write_file(folder / f"{stem}.safetensors", facts, tensor, metadata={"format": "pt"})
        return
    places: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        file = f"{stem}-{number:05}-of-{len(groups):05}.safetensors"
        write_file(folder / file, group, tensor, metadata={"format": "pt"})
        places |= dict.fromkeys(group, file)
    index = {"metadata": {"total_size": sum(about.size for about in facts.values())}, "weight_map": places}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2))
