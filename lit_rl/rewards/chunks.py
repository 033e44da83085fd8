"""Chunks of samples under way, and the scores that come back for them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_rl.rewards.base import RewardError


@dataclass
class Chunk:
    """Samples that were submitted together. futures: scores by label of the reward. place: among the chunks that are gathered together."""

    size: int
    futures: Mapping[str, Future[Mapping[str, Tensor]]]
    place: int


def checked(answer: Mapping[str, Tensor], *, count: int, label: str) -> dict[str, Tensor]:
    """Scores as Float64 "B" on the CPU. Raises RewardError, with the reward's `label`, unless there is one number per sample."""
    scores = {name: torch.as_tensor(values).detach().to("cpu", torch.float64) for name, values in answer.items()}
    for name, values in scores.items():
        if values.shape != (count,):
            raise RewardError(
                f"reward {label} answered {name} of shape {tuple(values.shape)} for {count} samples; "
                "score() must return one number per sample, in order"
            )
    return scores


def concatenated(rows: Sequence[Mapping[str, Tensor] | None], name: str, chunks: Sequence[Chunk]) -> Tensor:
    """Float64 "B" of one score over all chunks, NaN where a chunk failed. rows: scores by name of each chunk, None for a failed one."""
    lost = (torch.full((chunk.size,), math.nan, dtype=torch.float64) for chunk in chunks)
    return torch.cat(
        [torch.empty(0, dtype=torch.float64), *(nan if row is None else row[name] for row, nan in zip(rows, lost, strict=True))]
    )
