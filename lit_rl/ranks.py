"""Collectives: values that the processes of a run exchange."""

from __future__ import annotations

from functools import cache
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def gather_objects(value: T) -> list[T]:
    """`value` of every rank, in order. Collective."""
    if not distributed():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def gather_to_first(value: Any) -> dict[int, Any]:
    """`value` of every rank by rank, on the first; on the others their own only. Through CPU memory; collective."""
    if not distributed():
        return {0: value}
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    values: list[Any] | None = [None] * world if rank == 0 else None
    torch.distributed.gather_object(value, values, dst=0, group=cpu_group())
    return {rank: value} if values is None else dict(enumerate(values))


@cache
def cpu_group() -> Any:
    """All processes, connected by gloo: rollouts are gigabytes, which NCCL would copy to the GPUs first."""
    return torch.distributed.new_group(backend="gloo")
