"""Chunks of samples, the questions that rewards were asked about them, and the scores that come back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_rl.rewards.base import RewardError
from lit_rl.rewards.groups import CutGroup, Row
from lit_rl.types import Info

Scores = dict[str, Tensor]
"""Scores Float64 "B" by name."""


@dataclass(frozen=True)
class Chunk:
    """Samples that were submitted together. place: among the chunks that are gathered together; groups: their group ids, if they have."""

    info: Sequence[Info]
    groups: Sequence[int] | None
    place: int


@dataclass(frozen=True)
class Task:
    """Samples that one reward scores together, as scored in `future`, None on a process that has others score them.

    rows: Where these samples stand; cut: the group that they are, with members on other processes.
    """

    label: str
    rows: Sequence[Row]
    future: Future[Mapping[str, Tensor]] | None
    cut: CutGroup | None = None


def checked(answer: Mapping[str, Tensor], *, count: int, label: str) -> Scores:
    """Scores as Float64 "B" on the CPU. Raises RewardError, with the reward's `label`, unless there is one number per sample."""
    scores = {name: torch.as_tensor(values).detach().to("cpu", torch.float64) for name, values in answer.items()}
    for name, values in scores.items():
        if values.shape != (count,):
            raise RewardError(
                f"reward {label} answered {name} of shape {tuple(values.shape)} for {count} samples; "
                "score() must return one number per sample, in order"
            )
    return scores


class Table:
    """Scores of all chunks, in order of their places: NaN where nothing was written.

    Which samples a reward was asked about is kept beside them.
    """

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        order = sorted(range(len(chunks)), key=lambda i: chunks[i].place)
        self.starts, self.total = {}, 0
        for i in order:
            self.starts[i] = self.total
            self.total += len(chunks[i].info)
        self.info = [row for i in order for row in chunks[i].info]
        self.grouped = not chunks or any(chunk.groups is not None for chunk in chunks)
        self.groups = torch.tensor([g for i in order for g in chunks[i].groups or [-1] * len(chunks[i].info)], dtype=torch.long)
        self.scores: Scores = {}
        self.asked: dict[str, Tensor] = {}

    def add(self, name: str) -> None:
        """A column of NaN."""
        self.scores.setdefault(name, torch.full((self.total,), math.nan, dtype=torch.float64))
        self.asked.setdefault(name, torch.zeros(self.total, dtype=torch.bool))

    def write(self, names: Sequence[str], rows: Sequence[Row], scores: Scores | None) -> None:
        """Note that these samples were asked about, and their scores, None where there are none."""
        at = torch.tensor([self.starts[chunk] + row for chunk, row in rows], dtype=torch.long)
        for name in names:
            self.asked[name][at] = True
            if scores is not None:
                self.scores[name][at] = scores[name]
