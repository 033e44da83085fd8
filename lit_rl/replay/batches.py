"""Minibatches of token sequences: rows of a rollout as wide as the longest of them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lit_rl.replay.partition import places
from lit_rl.types import Media, Minibatch, TokenRollout


class TokenBatch(Minibatch):
    """N sequences, padded to the longest of them; S actions."""

    tokens: Tensor  # Int "N S+1"
    lengths: Tensor  # Int "N"
    group: Tensor  # Int "N"
    mask: Tensor  # Bool "N S"
    logprobs: Tensor  # Float "N S"
    advantages: Tensor  # Float "N S"
    weights: Tensor  # Float "N S"
    streams: dict[str, Tensor]  # "N S ..."
    columns: dict[str, Tensor]  # "N ..."
    media: Media


def token_batch(rollout: TokenRollout, rows: Tensor) -> TokenBatch:
    """The rows of a rollout, as wide as the longest of them. What has no weight is replaced, so that nothing in it can matter."""
    rows, kept = places(rows.to(rollout.lengths.device))
    shown, lengths, used = _stand_ins(rollout, rows)
    width = int(lengths.max())

    def stream(x: Tensor) -> Tensor:
        part = x[shown, : width - 1]
        return torch.where(used.view(-1, *[1] * (part.ndim - 1)), part, torch.zeros_like(part))

    return TokenBatch(
        tokens=rollout.tokens[shown, :width],
        lengths=lengths,
        group=rollout.group[rows],
        mask=stream(rollout.mask),
        logprobs=stream(rollout.logprobs),
        advantages=None if rollout.advantages is None else stream(rollout.advantages),
        weights=None if rollout.weights is None else stream(rollout.weights).where(kept[:, None], 0.0),
        streams={name: stream(x) for name, x in rollout.streams.items()},
        columns={name: x[rows] for name, x in rollout.columns.items()},
        media=[rollout.media[i] for i in shown.tolist()] if rollout.media else (),
    )


def _stand_ins(rollout: TokenRollout, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows to show in the place of `rows`, tokens of each, and Bool "N": those that are shown themselves.

    A row that trains, cut to two tokens, is shown for each that does not: 0 x NaN is NaN. One with media is shown whole: its tokens hold
    places for them.
    """
    lengths = rollout.lengths[rows]
    weighed = torch.ones_like(rollout.lengths, dtype=torch.bool) if rollout.weights is None else (rollout.weights != 0).any(1)
    used = weighed[rows]
    if used.all():
        return rows, lengths, used
    instead = weighed.nonzero()[:1, 0]
    shown = torch.where(used, rows, instead if len(instead) else rows)
    return shown, rollout.lengths[shown] if rollout.media else torch.where(used, lengths, lengths.clamp(max=2)), used


def finite_rows(rollout: TokenRollout) -> Tensor:
    """Bool "B": sequences of which all that was computed of their chosen tokens is finite."""
    known = [_whole_rows(x.isfinite().flatten(2).all(2) if x.ndim > 2 else x.isfinite(), rollout.mask) for x in _streams(rollout).values()]
    return torch.stack(known).all(0)


def without_rows(rollout: TokenRollout, kept: Tensor) -> TokenRollout:
    """The rollout in which the rows that are not kept (Bool "B") have no score and no chosen token, and 0 in all streams."""
    clean = {name: x.where(kept.view(-1, *[1] * (x.ndim - 1)), torch.zeros_like(x)) for name, x in _streams(rollout).items()}
    rewards = {name: values.where(kept.to(values.device), torch.nan) for name, values in rollout.rewards.items()}
    logprobs = clean.pop("logprobs")
    return replace(rollout, mask=rollout.mask & kept[:, None], rewards=rewards, logprobs=logprobs, streams=clean)


def _streams(rollout: TokenRollout) -> dict[str, Tensor]:
    return {"logprobs": rollout.logprobs} | rollout.streams


def _whole_rows(good: Tensor, mask: Tensor) -> Tensor:
    return (good | ~mask).all(1)
