"""A reward for servers in tests that tells its log what it was asked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from torch import Tensor

from lit_rl.rewards.jpeg import JPEGSizeReward
from lit_rl.types import Info


class Witness(JPEGSizeReward):
    """`jpeg_size`, and a line `asked [prompts]` for each call."""

    def score(self, media: Tensor, info: Sequence[Info]) -> Mapping[str, Tensor]:
        print("asked", json.dumps([row["prompt"] for row in info]), flush=True)
        return super().score(media, info)
