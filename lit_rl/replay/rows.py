"""Rows of a rollout of tokens: taken, joined, and read from a checkpoint, whatever streams, columns and media a method has added."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lit_rl.checkpoints.options import REMEDY
from lit_rl.errors import ConfigError
from lit_rl.types import TokenRollout

Of = Callable[[TokenRollout], Tensor]

EARLIER = {"behaviour": "streams", "reference": "streams", "values": "streams", "returns": "streams", "preference": "columns"}
"""Fields of the rollouts of earlier checkpoints, and where they are now."""


def select(rollout: TokenRollout, rows: Tensor) -> TokenRollout:
    """These rows of a rollout, in this order."""

    def taken(x: Tensor) -> Tensor:
        return x[rows.to(x.device)]

    def each(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: taken(x) for name, x in named.items()}

    return TokenRollout(
        group=taken(rollout.group),
        info=[rollout.info[i] for i in rows.tolist()],
        logprobs=taken(rollout.logprobs),
        mask=taken(rollout.mask),
        rewards=each(rollout.rewards),
        advantages=None if rollout.advantages is None else taken(rollout.advantages),
        weights=None if rollout.weights is None else taken(rollout.weights),
        streams=each(rollout.streams),
        columns=each(rollout.columns),
        media=[rollout.media[i] for i in rows.tolist()] if rollout.media else (),
        tokens=taken(rollout.tokens),
        lengths=taken(rollout.lengths),
        stopped=taken(rollout.stopped),
    )


def concatenated(parts: Sequence[TokenRollout]) -> TokenRollout:
    """The rows of several rollouts as one, as wide as the widest; rows without media have none beside rows with some.

    Raises ValueError where one has rewards, streams, columns, advantages or weights that another lacks.
    """
    first, width = parts[0], max(part.tokens.shape[1] for part in parts)
    for named in (_names_of(part) for part in parts[1:]):
        if odd := sorted(named ^ _names_of(first)):
            raise ValueError(f"rollouts cannot be joined: some have {', '.join(odd)}, and others do not")

    def rows(of: Of) -> Tensor:
        return torch.cat([of(part) for part in parts])

    def wide(of: Of, columns: int = width - 1) -> Tensor:
        return torch.cat([_widened(of(part), columns) for part in parts])

    return TokenRollout(
        group=rows(lambda p: p.group),
        info=[row for part in parts for row in part.info],
        logprobs=wide(lambda p: p.logprobs),
        mask=wide(lambda p: p.mask),
        rewards={name: rows(lambda p, name=name: p.rewards[name]) for name in first.rewards},
        advantages=None if first.advantages is None else wide(lambda p: _given(p.advantages)),
        weights=None if first.weights is None else wide(lambda p: _given(p.weights)),
        streams={name: wide(lambda p, name=name: p.streams[name]) for name in first.streams},
        columns={name: rows(lambda p, name=name: p.columns[name]) for name in first.columns},
        media=[row for p in parts for row in (p.media or [()] * len(p))] if any(part.media for part in parts) else (),
        tokens=wide(lambda p: p.tokens, width),
        lengths=rows(lambda p: p.lengths),
        stopped=rows(lambda p: p.stopped),
    )


def restored(stored: Mapping[str, Any]) -> TokenRollout:
    """A rollout from the fields that a checkpoint holds, those of earlier layouts too. Raises ConfigError for fields that no layout has."""
    layout = {f.name: f.default is MISSING and f.default_factory is MISSING for f in fields(TokenRollout)}
    odd = sorted(stored.keys() - layout.keys() - EARLIER.keys())
    missing = [name for name, required in layout.items() if required and name not in stored]
    if odd or missing:
        told = f"has {', '.join(odd)}, which this release does not know" if odd else f"lacks {', '.join(missing)}"
        raise ConfigError(
            f"the checkpoint was written inside an iteration, by another release of lit-rl: its rollout {told}. Continue with the release "
            f"that wrote it, {REMEDY}"
        )
    rollout = TokenRollout(**{name: value for name, value in stored.items() if name in layout})
    found = {name: stored[name] for name in EARLIER if stored.get(name) is not None}
    rollout = rollout.with_streams(**{name: x for name, x in found.items() if EARLIER[name] == "streams"})
    rollout = rollout.with_columns(**{name: x for name, x in found.items() if EARLIER[name] == "columns"})
    told_ends = len(rollout.stopped) == len(rollout)  # earlier ones of answers from the data do not say that these are whole
    return rollout if told_ends else replace(rollout, stopped=torch.ones(len(rollout), dtype=torch.bool))


def _names_of(rollout: TokenRollout) -> set[str]:
    """Names of everything that one rollout may have and another not."""
    named = {f"the {kind} {name}" for kind in ("rewards", "streams", "columns") for name in getattr(rollout, kind)}
    return named | {name for name in ("advantages", "weights") if getattr(rollout, name) is not None}


def _given(x: Tensor | None) -> Tensor:
    assert x is not None  # `_names_of` has been compared
    return x


def _widened(x: Tensor, width: int) -> Tensor:
    """ "B S ..." with zeros behind, so that S is `width`."""
    return pad(x, (0, 0) * (x.ndim - 2) + (0, width - x.shape[1]))
