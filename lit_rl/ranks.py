"""Collectives: what the processes of a run exchange. Processes may have different numbers of rows, or none.

Every function here is called by all processes, in the same order, and does nothing where there is only one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from lit_rl.errors import ConfigError

T = TypeVar("T")


def distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def place() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed() else (0, 1)


def lost_contact(error: BaseException) -> bool:
    """True for what a collective raises when another process has ended or does not answer.

    Gloo reports all that happens to other processes as a RuntimeError, most often with its own file, sometimes without.
    """
    said = str(error).lower()
    told = isinstance(error, RuntimeError) and ("gloo" in said or "caused pair closure" in said)
    return isinstance(error, torch.distributed.DistError) or told


# ---------------------------------------------------------------------- rows of tensors
def gather_rows(x: Tensor) -> Tensor:
    """Rows of all processes in order of rank: "B ..." -> "sum of all B ...", B of each process its own. Collective.

    x: With the same type and shape of a row everywhere, also where it has no rows; on the device that the processes are connected by.
    """
    if not distributed():
        return x
    return torch.cat(_parts(x))


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of a tensor over all processes, element by element and in order of rank, so that all have the same bits. Collective."""
    return torch.stack(_gathered(x)).sum(0) if distributed() else x


def on_all_rows(of: Callable[..., Tensor], *columns: Tensor) -> Tensor:
    """The rows here of `of(*columns)`, which sees the rows of all processes: a group may be split over several of them. Collective.

    columns: "B ...", each with the rows of this process; `of` returns "B ..." in the same order.
    """
    if not distributed():
        return of(*columns)
    parts = [_parts(column) for column in columns]
    rank, sizes = torch.distributed.get_rank(), [len(part) for part in parts[0]]
    return of(*map(torch.cat, parts)).split(sizes)[rank]


def _parts(x: Tensor) -> list[Tensor]:
    """The rows of each process."""
    counts = torch.stack(_gathered(torch.tensor(len(x), device=x.device))).tolist()
    missing = max(counts) - len(x)
    padded = torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x
    return [part[:count] for part, count in zip(_gathered(padded), counts)] if max(counts) else [x] * len(counts)


def _gathered(x: Tensor) -> list[Tensor]:
    """A tensor of equal shape on every process."""
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, x.contiguous())
    return parts


# ---------------------------------------------------------------------- tensors of weights
def gather_pieces(piece: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Flat pieces of equal length of every process of `group`, one behind the other. Collective."""
    pieces = piece.new_empty(torch.distributed.get_world_size(group) * piece.numel())
    torch.distributed.all_gather_into_tensor(pieces, piece, group=group)
    return pieces


def gather_pieces_to_first(piece: Tensor, group: ProcessGroup | None = None) -> Tensor | None:
    """The result of `gather_pieces` on the first process; None on the others, which send their own and receive nothing. Collective."""
    first, world = torch.distributed.get_rank() == 0, torch.distributed.get_world_size(group)
    pieces = piece.new_empty(world, piece.numel()) if first else None
    torch.distributed.gather(piece.contiguous(), None if pieces is None else list(pieces), dst=0, group=group)
    return None if pieces is None else pieces.view(-1)


def receive_from_first(tensor: Tensor) -> None:
    """Overwrite `tensor` with that of the first process. Collective."""
    torch.distributed.broadcast(tensor, 0)


# ---------------------------------------------------------------------- Python objects
def gather_objects(value: T) -> list[T]:
    """`value` of every rank, in order. Collective."""
    if not distributed():
        return [value]
    values = [value] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def all_or_none(begin: Callable[[], None]) -> None:
    """Call what may fail on some processes: then it fails on all, with the error of the first one that it failed on. Collective."""
    problem: Exception | None = None
    try:
        begin()
    except Exception as error:  # raised below, when the others know
        problem = error
    if told := [text for text in gather_objects(str(problem) if problem else None) if text is not None]:
        raise problem or ConfigError(told[0])


def gather_to_first(value: T) -> dict[int, T]:
    """`value` of every rank by rank, on the first; on the others their own only. Through CPU memory; collective."""
    rank, world = place()
    if world == 1:
        return {0: value}
    values = [value] * world if rank == 0 else None
    torch.distributed.gather_object(value, values, dst=0, group=cpu_group())
    return {rank: value} if values is None else dict(enumerate(values))


def exchange_objects(outgoing: Sequence[T]) -> list[T]:
    """One object of each rank for this one, in order of rank. Through CPU memory; collective.

    outgoing: One object for each rank. A process receives what is for it and nothing else, which `gather_objects` could not do.
    """
    rank, world = place()
    if world == 1:
        return list(outgoing)
    received: list[T] = []
    for source in range(world):
        mine = [outgoing[rank]]
        torch.distributed.scatter_object_list(mine, list(outgoing) if source == rank else None, src=source, group=cpu_group())
        received += mine
    return received


@cache
def cpu_group() -> ProcessGroup:
    """All processes, connected by gloo: rollouts are gigabytes, which NCCL would copy to the GPUs first."""
    group = torch.distributed.new_group(backend="gloo")
    assert isinstance(group, ProcessGroup)  # of which all processes are members
    return group


def sum_by_parts(flat: Tensor) -> Tensor:
    """The sum of a vector over all processes, each number added in the order of ranks. Collective.

    Each process adds up one part of it and hands that to all, as much traffic as that of a ring.
    """
    size = torch.distributed.get_world_size()
    share = -(-flat.numel() // size)
    padded = torch.nn.functional.pad(flat, (0, share * size - flat.numel()))
    parts = torch.empty_like(padded)
    torch.distributed.all_to_all_single(parts, padded)
    total = parts[:share].clone()
    for part in parts.split(share)[1:]:
        total += part
    torch.distributed.all_gather_into_tensor(padded, total)
    return padded[: flat.numel()]
