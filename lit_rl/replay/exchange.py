"""Sequences that move from the process that sampled them to the one that trains on them."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lit_rl.ranks import cpu_group, distributed
from lit_rl.replay.sequences import concatenated, select
from lit_rl.types import TokenRollout


def handed_over(rollout: TokenRollout, owner: Tensor) -> TokenRollout:
    """The sequences of all processes that this one owns, in order of their groups; siblings keep theirs.

    owner: Int "B" on the CPU, the rank that each sequence here goes to, or -1 for none. Through CPU memory, and only what changes hands;
    collective.
    """
    rank = torch.distributed.get_rank() if distributed() else 0
    parts = [select(rollout, (owner == rank).nonzero()[:, 0])]
    if distributed():
        leaving = (owner >= 0) & (owner != rank)
        sent = select(rollout, leaving.nonzero()[:, 0]).to("cpu")
        sent = replace(sent, info=[dict(row) for row in sent.info])  # a read-only view cannot be sent
        everyone: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, (sent, owner[leaving]), group=cpu_group())
        for theirs, whose in everyone:
            mine = select(theirs, (whose == rank).nonzero()[:, 0])
            parts.append(replace(mine, info=[MappingProxyType(row) for row in mine.info]).to(rollout.tokens.device))
    rollout = concatenated([part for part in parts if len(part)])
    return select(rollout, rollout.group.argsort(stable=True))
