"""Counter-based randomness: a draw is a function of (seed, purpose, iteration, sample), so there is nothing to restore on resume
and nothing that depends on micro-batches or on the number of processes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

Key = int | str
CPU = torch.device("cpu")


def seed_of(*key: Key) -> int:
    """A 63-bit seed from the parts of `key`: equal keys give equal seeds on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1


def generator(*key: Key) -> torch.Generator:
    """A CPU generator seeded by `seed_of(*key)`."""
    return torch.Generator().manual_seed(seed_of(*key))


def normal(keys: Sequence[tuple[Key, ...]], shape: Sequence[int], device: torch.device = CPU) -> Tensor:
    """Standard normal Float32 "B *shape", drawn on the CPU; row i depends on `keys[i]` alone.

    To a GPU it goes from pinned memory, without waiting for what the GPU is at: so this process draws ahead, while the GPU computes.
    """
    drawn, source = torch.empty(len(keys), *shape, pin_memory=device.type == "cuda"), torch.Generator()
    for row, key in zip(drawn, keys, strict=True):
        row.normal_(generator=source.manual_seed(seed_of(*key)))
    return drawn.to(device, non_blocking=True)


def uniforms(keys: Sequence[tuple[Key, ...]], count: int) -> Tensor:
    """Numbers in [0, 1), Float64 "B count" on the CPU; row i depends on `keys[i]` alone, its first ones not on `count`."""
    return torch.stack([torch.rand(count, dtype=torch.float64, generator=generator(*key)) for key in keys])
