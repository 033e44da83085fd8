"""Rows that say which rewards count for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lit_rl.credit.groups import Rewards, Weights, total_reward
from lit_rl.errors import ConfigError
from lit_rl.types import Info

KEY = "reward_weights"
"""A row's own weights by name of the score; a score that it leaves out has weight 0 there, and may be NaN."""


def weights_of_rows(info: Sequence[Info], weights: Mapping[str, float]) -> Weights:
    """Weights of the scores that count: the run's, or Float64 "B" where rows have their own. Scores of weight 0 everywhere are left out.

    Raises ConfigError where a row names a score that no reward gives, or gives no score a weight.
    """
    if not any(KEY in row for row in info):
        return {name: weight for name, weight in weights.items() if weight}
    for row in info:
        if unknown := sorted(set(row.get(KEY, {})) - set(weights)):
            raise ConfigError(f"prompt {row.get('prompt')!r}: {KEY} names {unknown}, but the rewards give {sorted(weights)}")
        if KEY in row and not any(row[KEY].values()):
            raise ConfigError(f"prompt {row.get('prompt')!r}: {KEY} gives no score a weight, so nothing is known of its samples: name one")
    own = {name: [float(row[KEY].get(name, 0.0)) if KEY in row else weight for row in info] for name, weight in weights.items()}
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in own.items() if any(values)}


def total_of_rows(rewards: Rewards, info: Sequence[Info], weights: Mapping[str, float]) -> Float[Tensor, "B"]:
    """`total_reward` of these rows by their own weights, or else by the run's; NaN where a score is missing that counts."""
    counting_here = weights_of_rows(info, weights)
    return total_reward({name: rewards[name] for name in counting_here}, counting_here)


def counting(info: Sequence[Info], weights: Mapping[str, float]) -> dict[str, Tensor]:
    """Bool "B" by score: the rows in which it counts, by their own weights or else by the run's."""
    own = {name: [bool(row[KEY].get(name)) if KEY in row else bool(weight) for row in info] for name, weight in weights.items()}
    return {name: torch.tensor(values, dtype=torch.bool) for name, values in own.items()}


def asks_for(row: Info, names: Sequence[str] | None) -> bool:
    """True where a row wants one of these scores computed: it has no weights of its own, or gives one of them a weight.

    names: None for a reward whose scores are not known yet, which is always asked.
    """
    return KEY not in row or names is None or any(row[KEY].get(name) for name in names)
