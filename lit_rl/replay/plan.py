"""The minibatches of an epoch in order, from the rollout and from supervised examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor


class Part(NamedTuple):
    """One minibatch: `rows` of the rollout, or, of the examples, the numbers of an optimizer step and of a micro-batch in it."""

    source: Literal["rollout", "examples"]
    rows: Tensor


def warmup_plan(*, steps: int, micro_batches: int) -> list[Part]:
    """Every optimizer step's micro-batches of examples."""
    return [Part("examples", torch.tensor([step, i])) for step in range(steps) for i in range(micro_batches)]


def rollout_plan(rows: Sequence[Tensor], *, updates: int, examples: int, first: int) -> list[Part]:
    """For each of `updates` optimizer steps an equal share of `rows` in order, then its micro-batches of examples.

    rows: Of each minibatch of the rollout. examples: Micro-batches of examples in an optimizer step. first: Number of the first step.
    """
    size = len(rows) // updates
    plan: list[Part] = []
    for update in range(updates):
        plan += [Part("rollout", part) for part in rows[update * size : (update + 1) * size]]
        plan += [Part("examples", torch.tensor([first + update, i])) for i in range(examples)]
    return plan
