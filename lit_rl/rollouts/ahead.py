"""Answers that are drawn before the iteration that trains on them."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from lit_rl.rollouts.base import Sample


@dataclass
class Ahead:
    """This process's answers for an iteration, done or under way."""

    iteration: int
    answers: Future[list[Sample]]

    def plain(self) -> list[tuple[list[int], list[float], str, list[int]]] | None:
        """The answers as plain data for a checkpoint; waits for them. None if they failed, which is raised where they are needed."""
        return None if self.answers.exception() else [(a.ids, a.logprobs, a.finish, a.versions) for a in self.answers.result()]

    @classmethod
    def of_plain(cls, iteration: int, rows: list[Any]) -> Ahead:
        """Done."""
        done: Future[list[Sample]] = Future()
        done.set_result([Sample(list(ids), list(logprobs), finish, list(versions)) for ids, logprobs, finish, versions in rows])
        return cls(iteration, done)
