"""Metrics of rewards over all processes: what failed, how they were asked, and where they disagree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor

from lit_rl.credit.agreement import discordance
from lit_rl.ranks import gather_objects
from lit_rl.rewards.base import Reward
from lit_rl.rewards.chunks import Table


class Measures:
    """The metrics of the last samples that were scored.

    - `reward/<name>/failed_fraction`: of the samples that it was asked about, those without a score.
    - `reward/<label>/<counter>`: totals since the start, as `Reward.counters` has them.
    - `reward/<label>/<average>`: since the last samples, as `Reward.averages` has them; left out where there is nothing to average.
    - `reward/<name>/disagrees_with/<other>`: of the pairs of siblings that both order, those that they order in opposite ways.
    - `reward/wait_seconds`: the longest wait of a process for its scores.
    """

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        self._before: dict[str, tuple[float, float]] = {}

    def take(self, table: Table, rewards: Mapping[str, Reward], waited: float, *, compared: Sequence[str]) -> None:
        """Collect the metrics. Collective. compared: Names of the scores that are held against each other."""
        counters = {f"reward/{label}/{k}": float(v) for label, reward in rewards.items() for k, v in reward.counters().items()}
        failed = {
            f"reward/{name}/failed_fraction": (float((values.isnan() & table.asked[name]).sum()), float(table.asked[name].sum()))
            for name, values in table.scores.items()
        }
        quotients = failed | self._since(rewards) | _disagreements(table, compared)
        numbers = [waited, *counters.values(), *(part for pair in quotients.values() for part in pair)]
        shared = share(numbers)
        sums = shared[:, 1:].sum(0).tolist()
        pairs = zip(quotients, zip(sums[len(counters) :: 2], sums[len(counters) + 1 :: 2], strict=True), strict=True)
        means = {key: total / count if count else 0.0 for key, (total, count) in pairs if count or key in failed}
        self.metrics = means | dict(zip(counters, sums)) | {"reward/wait_seconds": float(shared[:, 0].max())}

    def _since(self, rewards: Mapping[str, Reward]) -> dict[str, tuple[float, float]]:
        """Sums and counts of averages since the last call."""
        now = {f"reward/{label}/{key}": pair for label, reward in rewards.items() for key, pair in reward.averages().items()}
        before, self._before = self._before, now
        return {
            key: (total - before.get(key, (0.0, 0.0))[0], count - before.get(key, (0.0, 0.0))[1]) for key, (total, count) in now.items()
        }


def _disagreements(table: Table, names: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Discordant and ordered pairs of siblings, by two scores; none in evaluations, where there are no groups."""
    if not table.grouped:
        return {}
    present = sorted(name for name in names if name in table.scores)
    return {
        f"reward/{a}/disagrees_with/{b}": discordance(table.scores[a], table.scores[b], table.groups) for a, b in combinations(present, 2)
    }


def share(values: Sequence[float]) -> Tensor:
    """This rank's numbers -> Float64 "ranks N" of all. Collective."""
    return torch.tensor(gather_objects(list(values)), dtype=torch.float64)
