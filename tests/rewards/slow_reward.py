"""A reward that takes its time, for tests that name it by its dotted path."""

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lit_rl.rewards.base import Reward
from lit_rl.types import Info


class SlowReward(Reward):
    """`slow` = 1 after `seconds`."""

    def __init__(self, *, seconds: float) -> None:
        self.seconds = seconds

    def score(self, media: Tensor, info: Sequence[Info]) -> Mapping[str, Tensor]:
        time.sleep(self.seconds)
        return {"slow": torch.ones(len(media))}
