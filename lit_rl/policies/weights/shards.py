"""Weights that a strategy may have cut into shards: edits in place that reach them, and whole tensors out of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lit_rl.ranks import gather_pieces, gather_pieces_to_first, place


def local(parameter: Tensor) -> Tensor:
    """The storage an in-place edit must reach: the partition under DeepSpeed ZeRO-3, the tensor itself elsewhere."""
    return getattr(parameter, "ds_tensor", parameter)


def reshard(module: nn.Module) -> None:
    """Put the shards back in their place: after a forward without backward (a rollout) FSDP2 leaves gathered weights there, as ZeRO-3 does
    with some after any, and edits of those are lost, or come late. Nothing under other strategies."""
    for part in module.modules():
        if callable(back := getattr(part, "reshard", None)):
            back()


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """target <- source, in place, shard by shard; buffers are not looked at."""
    reshard(source)
    reshard(target)
    for mine, theirs in zip(target.parameters(), source.parameters(), strict=True):
        local(mine).copy_(local(theirs))


def gathered(module: nn.Module, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor as a copy on the CPU) of the named parameters, gathered one at a time. Collective: every rank must exhaust it."""
    reshard(module)
    for name, parameter in module.named_parameters():
        if name in names:
            yield name, whole(parameter)


@torch.no_grad()
def gathered_on_first(module: nn.Module, dtypes: Mapping[str, torch.dtype]) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor on the CPU) of the named parameters, each in its dtype; on other processes nothing.

    One at a time: a process converts its shard, sends it to the first one and receives none. Collective: every rank must exhaust it.
    """
    reshard(module)
    for name, parameter in module.named_parameters():
        if name in dtypes and (tensor := _on_first(parameter, dtypes[name])) is not None:
            yield name, tensor


def _on_first(parameter: Tensor, dtype: torch.dtype) -> Tensor | None:
    from torch.distributed.tensor import DTensor, Shard

    piece = part(parameter).to(dtype)
    if isinstance(parameter, DTensor):
        if parameter.device_mesh.ndim > 1 or parameter.placements != (Shard(0),):
            found = whole(parameter)
            return found.to(dtype) if place()[0] == 0 else None
        rows = -(-parameter.shape[0] // parameter.device_mesh.size())  # of the first process; the last ones may have fewer
        padded = torch.cat([piece, piece.new_zeros(rows - piece.shape[0], *piece.shape[1:])])
        return _first_of(padded.flatten(), parameter.shape, parameter.device_mesh.get_group())
    if isinstance(parameter, ZeroParameter):
        return _first_of(piece, parameter.ds_shape, parameter.ds_process_group)
    return piece.to("cpu", copy=True) if place()[0] == 0 else None


def _first_of(piece: Tensor, shape: torch.Size, group: torch.distributed.ProcessGroup) -> Tensor | None:
    """On the first process the tensor of that shape, of which every process holds a flat piece of equal length."""
    pieces = gather_pieces_to_first(sendable(piece, group), group)
    return None if pieces is None else pieces[: shape.numel()].view(shape).cpu()


def whole(tensor: Tensor) -> Tensor:
    """A copy on the CPU of a tensor, of all its shards where it is cut. Collective; call `reshard` before reading FSDP2's parameters."""
    from torch.distributed.tensor import DTensor

    if isinstance(tensor, DTensor):
        return tensor.full_tensor().detach().to("cpu", copy=True)
    if not hasattr(tensor, "ds_id"):
        return tensor.detach().to("cpu", copy=True)
    import deepspeed

    with deepspeed.zero.GatheredParameters([tensor]):
        return tensor.detach().to("cpu", copy=True)


def readable(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The whole tensor where it lies, in `dtype`: itself where that is what it is, else a copy. Collective; call `reshard` before it."""
    from torch.distributed.tensor import DTensor

    if isinstance(tensor, DTensor):
        return tensor.detach().to(dtype).full_tensor()  # type: ignore[attr-defined]  # converted first: less to send
    if not hasattr(tensor, "ds_id"):
        return tensor.detach().to(dtype)
    import deepspeed

    with deepspeed.zero.GatheredParameters([tensor]):
        return tensor.detach().to(dtype, copy=True)


@runtime_checkable
class ZeroParameter(Protocol):
    """A parameter under DeepSpeed ZeRO-3: this process's piece of it, and the size and shape of the whole."""

    ds_tensor: Tensor
    ds_numel: int
    ds_shape: torch.Size
    ds_process_group: torch.distributed.ProcessGroup


def part(parameter: Tensor) -> Tensor:
    """The part of a parameter on this process, as a plain tensor (flat under ZeRO-3). An alias: writing to it changes the parameter."""
    from torch.distributed.tensor import DTensor

    held = local(parameter).detach()
    return held.to_local() if isinstance(held, DTensor) else held


def gather_parts(piece: Tensor, parameter: Tensor) -> Tensor:
    """A copy on the CPU of the whole tensor of which every process holds the `piece` that is cut like its `part(parameter)`. Collective."""
    from torch.distributed.tensor import DTensor

    if isinstance(parameter, DTensor):
        mesh, placements, shape, stride = parameter.device_mesh, parameter.placements, parameter.shape, parameter.stride()
        return whole(DTensor.from_local(piece, mesh, placements, run_check=False, shape=shape, stride=stride))
    if not isinstance(parameter, ZeroParameter):
        return whole(piece)
    group = parameter.ds_process_group
    pieces = gather_pieces(sendable(piece, group), group)
    return whole(pieces[: parameter.ds_numel].view(parameter.ds_shape))


def part_of(tensor: Tensor, parameter: Tensor) -> Tensor:
    """The piece of a whole `tensor` that this process holds of `parameter`, on the same device. Inverse of `gather_parts`."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    device = local(parameter).device
    if isinstance(parameter, DTensor):
        placed = distribute_tensor(tensor.to(device), parameter.device_mesh, parameter.placements, src_data_rank=None)
        return placed.to_local().clone()
    if not isinstance(parameter, ZeroParameter):
        return tensor.to(device, copy=True)
    size, rank = parameter.ds_tensor.numel(), torch.distributed.get_rank(parameter.ds_process_group)
    piece = tensor.flatten()[rank * size : (rank + 1) * size].to(device)
    return torch.cat([piece, piece.new_zeros(size - piece.numel())])


def sendable(tensor: Tensor, group: torch.distributed.ProcessGroup | None = None) -> Tensor:
    """`tensor` where the backend of the processes can send it from: NCCL does not see what is offloaded to the CPU."""
    return tensor.cuda() if torch.distributed.get_backend(group) == "nccl" else tensor
