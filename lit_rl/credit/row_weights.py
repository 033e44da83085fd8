"""Rows that say which rewards count for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from lit_rl.credit.groups import Weights
from lit_rl.errors import ConfigError
from lit_rl.types import Info

KEY = "reward_weights"
"""A row's own weights by name of the score; a score that it leaves out has weight 0 there, and may be NaN."""


def weights_of_rows(info: Sequence[Info], weights: Mapping[str, float]) -> Weights:
    """Weights of the scores that count: the run's, or Float64 "B" where rows have their own. Scores of weight 0 everywhere are left out.

    Raises ConfigError where a row names a score that no reward gives.
    """
    if not any(KEY in row for row in info):
        return {name: weight for name, weight in weights.items() if weight}
    for row in info:
        if unknown := sorted(set(row.get(KEY, {})) - set(weights)):
            raise ConfigError(f"prompt {row.get('prompt')!r}: {KEY} names {unknown}, but the rewards give {sorted(weights)}")
    own = {name: [float(row[KEY].get(name, 0.0)) if KEY in row else weight for row in info] for name, weight in weights.items()}
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in own.items() if any(values)}
