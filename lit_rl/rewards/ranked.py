"""Ranks within a group in place of another reward's scores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_rl.rewards.base import Reward
from lit_rl.rewards.judges.pairs import ranks
from lit_rl.types import Info


class RankReward(Reward):
    """`<score>_rank` = (rank - 1) / n of each of a reward's scores among the samples of a group, ascending; equal scores share a rank.

    Outliers and the scale of a score then do not count (PickScore ranks of Flow-Factory). A sample without a score has no rank.

    Args:
        reward: Its scores are ranked.
    """

    compares = True

    def __init__(self, reward: Reward) -> None:
        self.reward = reward
        self.medium, self.remedy = reward.medium, reward.remedy
        self.outputs = [f"{name}_rank" for name in reward.outputs]

    def setup(self, *, rank: int, world_size: int, device: str) -> None:
        self.reward.setup(rank=rank, world_size=world_size, device=device)

    def check(self, rows: Iterable[Info]) -> None:
        if type(self.reward).check is not Reward.check:
            self.reward.check(rows)

    def score(self, media: Any, info: Sequence[Info]) -> Mapping[str, Tensor]:
        """Ranks Float64 "B" within the one group that these samples are."""
        return self._ranked(self.reward.score(media, info))

    async def score_async(self, media: Any, info: Sequence[Info]) -> Mapping[str, Tensor]:
        return self._ranked(await self.reward.score_async(media, info))

    def _ranked(self, scores: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        self.last_error = self.reward.last_error
        return {f"{name}_rank": torch.tensor(ranks(values.double().tolist()), dtype=torch.float64) for name, values in scores.items()}

    def counters(self) -> Mapping[str, float]:
        return self.reward.counters()

    def averages(self) -> Mapping[str, tuple[float, float]]:
        return self.reward.averages()

    async def close(self) -> None:
        await self.reward.close()
