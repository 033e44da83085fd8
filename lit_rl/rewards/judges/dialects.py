"""Answers of judges read strictly: a value, or None where an answer does not say exactly one. None is never taken for 0."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Literal

from lit_rl.rewards.judges.messages import plain

Dialect = Literal["final_score", "tag", "json"]
"""Forms of one mark: `Final Score: 4`, `<score>4</score>`, `{"score": 4}`."""

WANTED: Mapping[str, str] = {"final_score": "`Final Score: X`", "tag": "`<score>X</score>`", "json": '`{"score": X}`'}
_NUMBER = r"(-?\d+(?:\.\d+)?)(?!\d)(?:\s*/\s*(\d+(?:\.\d+)?))?"
_FORMS = {
    "final_score": re.compile(rf"final score\s*(?:\(1-5\))?\s*:\s*{_NUMBER}", re.IGNORECASE),
    "tag": re.compile(rf"<\s*score\s*>\s*{_NUMBER}\s*<\s*/\s*score\s*>", re.IGNORECASE),
}
_POINTS = re.compile(rf"(\w+) score\s*\(1-5\)\s*:\s*{_NUMBER}", re.IGNORECASE)
_UPSTREAM_POINTS = re.compile(r"(\w+) Score \(1-5\):\s*([0-5](?:\.\d+)?)")
_OPEN, _CLOSE = re.compile(r"<\s*(think|thought)\s*>", re.IGNORECASE), re.compile(r"<\s*/\s*(think|thought)\s*>", re.IGNORECASE)


def after_thoughts(answer: str) -> str | None:
    """The text behind the last block of thoughts; None where one is begun and not ended. A template may have begun it for the model."""
    ends = [match.end() for match in _CLOSE.finditer(answer)]
    rest = answer[ends[-1] :] if ends else answer
    return None if _OPEN.search(rest) else rest


def read_mark(answer: str, *, dialect: Dialect, low: float = 1.0, high: float = 5.0) -> float | None:
    """The mark in [low, high] that an answer gives last, outside its thoughts. `4/5` has to name `high` as its denominator."""
    if (text := after_thoughts(answer)) is None:
        return None
    if dialect == "json":
        value = (last_object(text) or {}).get("score")
        try:
            mark = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
        except ValueError:
            return None
        return mark if low <= mark <= high else None
    found = _FORMS[dialect].findall(plain(text))
    return _within(*found[-1], low=low, high=high) if found else None


def read_points(answer: str, *, names: Sequence[str] = ("alignment", "style")) -> dict[str, float] | None:
    """`Alignment Score (1-5): 4.2` -> {"alignment": 4.2, ...}, the last mark of each of `names`; None unless all have one in [1, 5]."""
    if (text := after_thoughts(answer)) is None:
        return None
    told = {name.lower(): _within(number, of, low=1.0, high=5.0) for name, number, of in _POINTS.findall(plain(text))}
    marks = {name: mark for name in names if (mark := told.get(name)) is not None}
    return marks if len(marks) == len(names) else None


def upstream_points(answers: Sequence[str], *, name: str) -> list[float]:
    """DeepGen-RL's marks of one name: the first in [0, 6), and where there is none the mean of the other answers', 0 without any.

    `reward_utils` of deepgen_rl; kept for comparison with its numbers, `read_points` is used by rewards.
    """
    told = [{key.lower(): float(value) for key, value in reversed(_UPSTREAM_POINTS.findall(answer))}.get(name) for answer in answers]
    known = [mark for mark in told if mark is not None]
    mean = sum(known) / len(known) if known else 0.0
    return [mean if mark is None else mark for mark in told]


def last_object(text: str) -> dict[str, object] | None:
    """The last JSON object that stands in a text, not inside another one; None where there is none."""
    decoder, found, at = json.JSONDecoder(), None, text.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            end = at + 1
        else:
            found = value
        at = text.find("{", end)
    return found if isinstance(found, dict) else None


def _within(number: str, denominator: str, *, low: float, high: float) -> float | None:
    """A mark in its range, out of `high` where it says out of how many."""
    if denominator and float(denominator) != high:
        return None
    return mark if low <= (mark := float(number)) <= high else None
