"""A reward without meaning: for dry runs of everything around it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lit_rl.rewards.base import Reward
from lit_rl.types import Info


class PseudoReward(Reward):
    """`pseudo` in [0, 1), uniform over images: a hash of the seed, the prompt and every pixel. Same input, same score, on any machine."""

    outputs = ("pseudo",)

    def __init__(self, *, seed: int = 0) -> None:
        self.seed = seed

    def score(self, media: Tensor, info: Sequence[Info]) -> Mapping[str, Tensor]:
        images = media.permute(0, 2, 3, 1).cpu()
        return {"pseudo": torch.tensor([self._uniform(image, str(row["prompt"])) for image, row in zip(images, info, strict=True)])}

    def _uniform(self, image: Tensor, prompt: str) -> float:
        key = f"{self.seed}|{tuple(image.shape)}|{prompt}".encode()
        digest = hashlib.blake2b(image.contiguous().numpy().tobytes(), digest_size=3, key=hashlib.blake2b(key).digest()).digest()
        return int.from_bytes(digest, "little") / 2**24
