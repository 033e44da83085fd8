"""A reward without meaning: for dry runs of everything around it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lit_rl.rewards.base import Reward
from lit_rl.types import Info


class PseudoReward(Reward):
    """`pseudo` in [0, 1), uniform over samples: a hash of the seed, the prompt and the whole image or text. The same on any machine.

    Args:
        seed: Another one gives other numbers.
    """

    outputs = ("pseudo",)
    medium = None

    def __init__(self, *, seed: int = 0) -> None:
        self.seed = seed

    def score(self, media: Tensor | Sequence[str], info: Sequence[Info]) -> Mapping[str, Tensor]:
        """A hash of each sample, as a number."""
        samples = media.permute(0, 2, 3, 1).cpu() if isinstance(media, Tensor) else media
        return {"pseudo": torch.tensor([self._uniform(sample, str(row["prompt"])) for sample, row in zip(samples, info, strict=True)])}

    def _uniform(self, sample: Tensor | str, prompt: str) -> float:
        shape, content = (
            ("text", sample.encode()) if isinstance(sample, str) else (tuple(sample.shape), sample.contiguous().numpy().tobytes())
        )
        key = f"{self.seed}|{shape}|{prompt}".encode()
        digest = hashlib.blake2b(content, digest_size=3, key=hashlib.blake2b(key).digest()).digest()
        return int.from_bytes(digest, "little") / 2**24
