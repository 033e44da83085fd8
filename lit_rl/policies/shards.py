"""Weights that a strategy may have cut into shards: edits in place that reach them, and whole tensors out of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn


def local(parameter: Tensor) -> Tensor:
    """The storage an in-place edit must reach: the partition under DeepSpeed ZeRO-3, the tensor itself elsewhere."""
    return getattr(parameter, "ds_tensor", parameter)


def reshard(module: nn.Module) -> None:
    """Put the shards back in their place: after a forward without backward (a rollout) FSDP2 leaves gathered weights there, and edits of
    those are lost. Nothing under other strategies."""
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
