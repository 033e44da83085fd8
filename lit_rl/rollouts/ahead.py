"""Answers that are drawn before the iteration that trains on them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal, TypedDict

from lit_rl.rollouts.base import Sample

Plain = tuple[list[int], list[float], Literal["stop", "length"], list[int]]
"""ids, logprobs, finish and versions of an answer."""


class SavedAhead(TypedDict):
    """Answers of an iteration in a checkpoint, by process; None where they failed."""

    iteration: int
    ranks: dict[int, list[Plain] | None]


@dataclass
class Ahead:
    """This process's answers for an iteration, done or under way."""

    iteration: int
    answers: Future[list[Sample]]

    def plain(self) -> list[Plain] | None:
        """The answers as plain data for a checkpoint; waits for them. None if they failed, which is raised where they are needed."""
        return None if self.answers.exception() else [(a.ids, a.logprobs, a.finish, a.versions) for a in self.answers.result()]

    @classmethod
    def of_plain(cls, iteration: int, rows: Sequence[Plain]) -> Ahead:
        """Done."""
        done: Future[list[Sample]] = Future()
        done.set_result([Sample(list(ids), list(logprobs), finish, list(versions)) for ids, logprobs, finish, versions in rows])
        return cls(iteration, done)
