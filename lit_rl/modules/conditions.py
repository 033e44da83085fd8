"""Conditioning of a flow model on its prompts: computed once for a rollout, or in each loss where the policy trains it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from lit_rl.losses.masked import harmless
from lit_rl.policies.base import FlowPolicy
from lit_rl.types import Cond, FlowRollout, Info, Media, Minibatch, take_rows


class FlowBatch(Minibatch):
    """N rows of a rollout with the conditioning of their prompts."""

    weights: Tensor  # Float "N"
    cond: Cond | None  # "N ...", of the rollout; None where the policy trains it
    info: Sequence[Info]  # then N prompts, else none
    streams: dict[str, Tensor]  # "N ..." by name
    columns: dict[str, Tensor]  # "N ..." by name
    media: Media


def conditioned(policy: FlowPolicy, info: Sequence[Info], device: torch.device) -> tuple[Cond, Tensor]:
    """Each different prompt of B conditioned once, "U ...", and the row of the result for each of them, Int "B" on the device."""
    keys = [policy.condition_key(row) for row in info]
    unique: dict[Hashable, Info] = {}
    for key, row in zip(keys, info):
        unique.setdefault(key, row)
    place = {key: i for i, key in enumerate(unique)}
    return policy.condition(list(unique.values())), torch.tensor([place[key] for key in keys], device=device)


def stored_conditions(policy: FlowPolicy, rollout: FlowRollout, rows: Tensor, *, used: Tensor) -> dict[str, object]:
    """`cond` and `info` of a `FlowBatch` of these trajectories. used: Bool "N", rows with a weight."""
    if policy.trains_condition:
        return {"cond": None, "info": [rollout.info[i] for i in rows.tolist()]}
    cond = take_rows(rollout.cond, rollout.cond_row[rows])
    return {"cond": {name: harmless(value, used) for name, value in cond.items()}, "info": ()}


def carried(rollout: FlowRollout, rows: Tensor, actions: Tensor, *, used: Tensor) -> dict[str, object]:
    """`streams`, `columns` and `media` of a `FlowBatch` of these trajectories and actions. used: Bool "N", rows with a weight."""
    return {
        "streams": {name: harmless(x[rows, actions], used) for name, x in rollout.streams.items()},
        "columns": {name: harmless(x[rows], used) for name, x in rollout.columns.items()},
        "media": [rollout.media[i] for i in rows.tolist()] if rollout.media else (),
    }


def trained_conditions(policy: FlowPolicy, batch: FlowBatch) -> Cond:
    """Conditioning "N ..." by the weights that answer now, with gradient."""
    cond, rows = conditioned(policy, batch.info, batch.weights.device)
    return {name: harmless(value, batch.weights != 0) for name, value in take_rows(cond, rows).items()}
