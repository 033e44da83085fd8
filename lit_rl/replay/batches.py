"""Minibatches of token sequences: rows of a rollout as wide as the longest of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lit_rl.replay.partition import places
from lit_rl.types import Minibatch, TokenRollout

STREAMS = ("mask", "advantages", "weights", "logprobs", "behaviour", "reference", "values", "returns")


class TokenBatch(Minibatch):
    """N sequences, padded to the longest of them; S actions."""

    tokens: Tensor  # Int "N S+1"
    lengths: Tensor  # Int "N"
    mask: Tensor  # Bool "N S"
    advantages: Tensor  # Float "N S"
    weights: Tensor  # Float "N S"
    logprobs: Tensor  # Float "N S"
    behaviour: Tensor | None  # Float "N S"
    reference: Tensor | None  # Float "N S"
    values: Tensor | None  # Float "N S"
    returns: Tensor | None  # Float "N S"
    preference: Tensor | None  # Int "N"


def token_batch(rollout: TokenRollout, rows: Tensor) -> TokenBatch:
    """The rows of a rollout, as wide as the longest of them. What has no weight is replaced, so that nothing in it can matter."""
    rows, kept = places(rows.to(rollout.lengths.device))
    preference = None if rollout.preference is None else rollout.preference[rows]
    lengths = rollout.lengths[rows]
    weighed = torch.ones_like(rollout.lengths, dtype=torch.bool) if rollout.weights is None else (rollout.weights != 0).any(1)
    used = weighed[rows]
    if not used.all():  # the beginning of a sequence that trains, in the place of each that does not: 0 x NaN is NaN
        instead = weighed.nonzero()[:1, 0]
        rows = torch.where(used, rows, instead if len(instead) else rows)
        lengths = torch.where(used, lengths, lengths.clamp(max=2))
    width = int(lengths.max())
    streams = {name: None if (v := getattr(rollout, name)) is None else v[rows, : width - 1] for name in STREAMS}
    streams = {name: None if v is None else torch.where(used[:, None], v, torch.zeros_like(v)) for name, v in streams.items()}
    if streams["weights"] is not None:
        streams["weights"] = streams["weights"].where(kept[:, None], 0.0)
    return TokenBatch(tokens=rollout.tokens[rows, :width], lengths=lengths, preference=preference, **streams)


def finite_rows(rollout: TokenRollout) -> Tensor:
    """Bool "B": sequences of which all that was computed of their chosen tokens is finite."""
    streams = (rollout.logprobs, rollout.behaviour, rollout.reference, rollout.values)
    known = [(stream.isfinite() | ~rollout.mask).all(1) for stream in streams if stream is not None]
    return torch.stack(known).all(0)


def without_rows(rollout: TokenRollout, kept: Tensor) -> TokenRollout:
    """The rollout in which the rows that are not kept (Bool "B") have no score and no chosen token."""
    streams = {name: getattr(rollout, name) for name in ("logprobs", "behaviour", "reference", "values")}
    clean: dict[str, Any] = {name: v if v is None else torch.where(kept[:, None], v, torch.zeros_like(v)) for name, v in streams.items()}
    rewards = {name: values.where(kept.to(values.device), torch.nan) for name, values in rollout.rewards.items()}
    return replace(rollout, mask=rollout.mask & kept[:, None], rewards=rewards, **clean)
