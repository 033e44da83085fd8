"""Gradients of DDP in the processes of a scale test, in the first step of a process and in a later one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lit_rl.ranks import gather_rows
from lit_rl.strategies.summing import sum_in_order


def steps(ordered: bool) -> dict[str, Any]:
    """Three backwards of the same weights and rows: is the last gradient the first one, and how far are they from the mean in float64?"""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(13, 32), nn.SiLU(), nn.Linear(32, 7))
    rows = torch.randn(6, 13, generator=torch.Generator().manual_seed(rank))
    own = [g.double() for g in torch.autograd.grad(network(rows).square().mean(), list(network.parameters()))]
    mean = torch.cat([gather_rows(g.flatten()[None]).mean(0) for g in own])
    parallel = DistributedDataParallel(network)
    if ordered:
        sum_in_order(SimpleNamespace(model=parallel))  # type: ignore[arg-type]
    found = []
    for _ in range(3):
        network.zero_grad()
        parallel(rows).square().mean().backward()
        found.append(torch.cat([parameter.grad.flatten() for parameter in network.parameters() if parameter.grad is not None]))
    return {"same": torch.equal(found[0], found[2]), "apart": float((found[0] - mean).abs().max())}
