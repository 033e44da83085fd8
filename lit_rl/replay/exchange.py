"""Sequences that move from the process that sampled them to the one that trains on them."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from torch import Tensor

from lit_rl.ranks import exchange_objects, place
from lit_rl.replay.rows import concatenated, select
from lit_rl.types import TokenRollout


def handed_over(rollout: TokenRollout, owner: Tensor) -> TokenRollout:
    """The sequences of all processes that this one owns, in order of their groups; siblings keep theirs.

    owner: Int "B" on the CPU, the rank that each sequence here goes to, or -1 for none. Through CPU memory, and only what changes hands;
    collective.
    """
    rank, world = place()
    stays = select(rollout, (owner == rank).nonzero()[:, 0])
    sent = [select(rollout, (owner == r).nonzero()[:, 0] if r != rank else owner[:0]).to("cpu") for r in range(world)]
    received = exchange_objects([replace(part, info=[dict(row) for row in part.info]) for part in sent])  # a read-only view cannot be sent
    parts = [replace(part, info=[MappingProxyType(row) for row in part.info]).to(rollout.tokens.device) for part in received]
    joined = concatenated([part for part in (stays, *parts) if len(part)] or [stays])
    return select(joined, joined.group.argsort(stable=True))
