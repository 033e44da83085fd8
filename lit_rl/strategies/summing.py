"""DDP whose sums do not depend on where in a bucket a gradient lies."""

# Without `from __future__ import annotations`: DDP looks at the annotations of a hook themselves.
import torch.distributed as dist
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from lit_rl.ranks import sum_by_parts


def sum_in_order(strategy: Strategy) -> None:
    """Have DDP over more than two gloo processes sum each gradient in the order of ranks. Call it before the first backward.

    Gloo adds the numbers of a bucket in an order that their place in it decides, and DDP orders the first bucket of a process otherwise
    than all later ones. So a run that was stopped would end about 1e-8 apart from an unbroken one. Two have the same sum in either order.
    """
    model = strategy.model
    if isinstance(model, DistributedDataParallel) and dist.get_world_size() > 2 and dist.get_backend() == "gloo":
        model.register_comm_hook(None, mean_in_order)


def mean_in_order(_: object, bucket: dist.GradBucket) -> Future[Tensor]:
    """The mean of a bucket over all processes. Collective."""
    total = sum_by_parts(bucket.buffer())
    done: Future[Tensor] = Future()
    done.set_result(total / dist.get_world_size())
    return done
