"""A reward without meaning: for dry runs of everything around it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lit_rl.errors import ConfigError
from lit_rl.rewards.base import Reward
from lit_rl.types import Info

DEBUG_VARIABLE = "DISABLE_RL_REWARD_MODEL"
YES, NO = ("1", "true", "yes", "on", "y", "t"), ("", "0", "false", "no", "off", "n", "f")


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


def is_dry_run() -> bool:
    """True when $DISABLE_RL_REWARD_MODEL says yes. Raises ConfigError for a value that says neither yes nor no."""
    value = os.environ.get(DEBUG_VARIABLE, "").strip().lower()
    if value not in (*YES, *NO):
        raise ConfigError(f"{DEBUG_VARIABLE}={value} in the environment is neither true nor false; set it to true, or unset it")
    return value in YES


class _PseudoScores(Reward):
    """Stands for a reward in a dry run: the same names, other numbers."""

    medium = None

    def __init__(self, outputs: Sequence[str]) -> None:
        self.outputs = outputs

    def score(self, media: Tensor | Sequence[str], info: Sequence[Info]) -> Mapping[str, Tensor]:
        """Another hash for each name."""
        return {name: PseudoReward(seed=i).score(media, info)["pseudo"] for i, name in enumerate(self.outputs)}


def stand_ins(rewards: Mapping[str, Reward], weights: Mapping[str, float] | None) -> dict[str, Reward]:
    """Rewards of a dry run, by label. Those that do not declare their names get those that only the weights name, else their label."""
    declared = {name for reward in rewards.values() for name in reward.outputs}
    free = [name for name in weights or {} if name not in declared]
    found: dict[str, Reward] = {}
    for label, reward in rewards.items():
        names = list(reward.outputs)
        if not names:
            names, free = free or [label], []
        found[label] = _PseudoScores(names)
    return found
