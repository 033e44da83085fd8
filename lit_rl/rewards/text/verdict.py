"""The verdict of a rule on an answer."""

from __future__ import annotations

from typing import NamedTuple


class Verdict(NamedTuple):
    """A rule's score, whether the answer is right, and what was read in it (None: nothing that looks like an answer)."""

    score: float
    right: bool
    read: str | None
