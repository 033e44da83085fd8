"""What the first process holds of weights that are cut over several, as functions that each of them calls."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from ragged import rank_and_size
from torch import nn

from lit_rl import ranks
from lit_rl.policies.weights.shards import gathered_on_first


class Odd(nn.Module):
    """Shapes that three processes cannot cut into equal parts; one has fewer rows than there are processes."""

    def __init__(self) -> None:
        super().__init__()
        drawn = torch.Generator().manual_seed(3)
        shapes = {"tall": (7, 3), "flat": (2, 5), "one": (1,), "list": (8,), "even": (6, 2, 2)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=drawn)))


def on_first(strategy: str, dtypes: dict[str, str], mesh: list[int] | None = None) -> dict[str, Any]:
    """What `gathered_on_first` gives this process, and how many tensors of others it received."""
    _, size = rank_and_size()
    module = Odd()
    if strategy == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        sizes = tuple(mesh or [size])
        fully_shard(module, mesh=init_device_mesh("cpu", sizes, mesh_dim_names=("copies", "shards")[-len(sizes) :]))
    received = []
    real = torch.distributed.gather

    def gather(piece: Any, pieces: Any, **given: Any) -> None:
        received.append(0 if pieces is None else len(pieces))
        real(piece, pieces, **given)

    with mock.patch.object(ranks.torch.distributed, "gather", gather):
        found = dict(gathered_on_first(module, {name: getattr(torch, dtype) for name, dtype in dtypes.items()}))
    told = {name: [str(tensor.dtype), str(tensor.device), tensor.float().tolist()] for name, tensor in found.items()}
    return {"found": told, "received": received}
