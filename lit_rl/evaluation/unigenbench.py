"""UniGenBench (arXiv 2508.20751): a judge says of each testpoint of a prompt whether its image fulfils it; accuracy is the share that is.

Formulas and files; `lit_rl.evaluation.judging` asks the judge.
"""

from __future__ import annotations

import ast
import csv
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Language = Literal["en", "zh"]
Unreadable = Literal["missing", "wrong"]
Status = Literal["judged", "no_image", "no_answer", "unreadable"]

SEPARATORS: Mapping[Language, str] = {"en": " - ", "zh": "-"}
"""Between a dimension and the part of it that a testpoint is about."""


@dataclass(frozen=True)
class Verdict:
    """The words of a judge on one image. scores: 1 or 0 of each testpoint, None where there is no answer that says them."""

    index: int
    duplicate: int
    prompt: str
    file: str
    testpoints: Sequence[str]
    status: Status
    scores: Sequence[int] | None = None
    analysis: Sequence[str] = ()
    reason: str = ""


@dataclass(frozen=True)
class Share:
    """Testpoints that are fulfilled, among those that were judged."""

    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        """Their share, NaN where none was judged."""
        return self.correct / self.total if self.total else math.nan

    def row(self) -> dict[str, float | int | None]:
        """The row of a file; an unknown share is null."""
        return {"accuracy": self.accuracy if self.total else None, "correct": self.correct, "total": self.total}


def read_verdict(answer: str, testpoints: Sequence[str]) -> tuple[list[int], list[str]] | None:
    """The 0s and 1s in `<score>[...]</score>` with the reasons in `<analysis>[...]</analysis>`; None unless both are there and whole.

    Both are lists of Python literals, the scores as many as the testpoints. Thoughts in front of the answer do not count.
    """
    text = re.sub(r"<think>.*?</think>", "", answer, flags=re.DOTALL)
    found = [re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL) for tag in ("analysis", "score")]
    if "<think>" in text or not all(found):
        return None
    try:
        analysis, scores = (ast.literal_eval(parts[-1].strip()) for parts in found)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    if not isinstance(analysis, list) or not isinstance(scores, list) or len(scores) != len(testpoints):
        return None
    if not all(type(score) is int and score in (0, 1) for score in scores):
        return None
    return scores, [str(reason) for reason in analysis]


def counted(verdicts: Iterable[Verdict], *, unreadable: Unreadable = "missing") -> list[tuple[str, int]]:
    """(testpoint, 1 or 0) of every judged one. unreadable: `wrong` counts images without a score as 0 in each testpoint, as upstream."""
    rows: list[tuple[str, int]] = []
    for verdict in verdicts:
        if verdict.scores is not None:
            rows += zip(verdict.testpoints, verdict.scores, strict=True)
        elif unreadable == "wrong" and verdict.status != "no_image":
            rows += [(point, 0) for point in verdict.testpoints]
    return rows


def primary(testpoint: str, *, separator: str = " - ") -> str:
    """The dimension that a testpoint belongs to."""
    return testpoint.split(" - " if " - " in testpoint else separator)[0].strip()


def statistics(verdicts: Sequence[Verdict], *, unreadable: Unreadable = "missing", separator: str = " - ") -> dict[str, object]:
    """Accuracy over all testpoints, by dimension and by part of a dimension; the share of images with a readable answer.

    A dimension of which nothing was judged has accuracy null.
    """
    rows = counted(verdicts, unreadable=unreadable)
    names = [point for verdict in verdicts for point in verdict.testpoints]
    asked = [verdict for verdict in verdicts if verdict.status != "no_image"]
    whole = Share(sum(score for _, score in rows), len(rows))
    answered = sum(verdict.status == "judged" for verdict in asked)
    return {
        "success": bool(asked),
        "overall_accuracy": whole.row()["accuracy"],
        "total_correct": whole.correct,
        "total_count": whole.total,
        "success_rate": answered / len(asked) if asked else None,
        "primary_dims": _by(
            [primary(name, separator=separator) for name in names], [(primary(p, separator=separator), s) for p, s in rows]
        ),
        "sub_dims": _by(names, rows),
    }


def _by(names: Iterable[str], rows: Iterable[tuple[str, int]]) -> dict[str, dict[str, float | int | None]]:
    known: dict[str, list[int]] = {name: [] for name in names}
    for name, score in rows:
        known[name].append(score)
    return {name: Share(sum(scores), len(scores)).row() for name, scores in known.items()}


def metrics(name: str, verdicts: Sequence[Verdict], *, unreadable: Unreadable = "missing", separator: str = " - ") -> dict[str, float]:
    """`eval/NAME/overall_accuracy`, `success_rate` and parts of dimensions, `Dimension.Dimension-Part`; what is unknown is left out."""
    told = statistics(verdicts, unreadable=unreadable, separator=separator)
    found = {key: told[key] for key in ("overall_accuracy", "success_rate")}
    parts = told["sub_dims"]
    assert isinstance(parts, dict)
    found |= {metric_name(point, separator=separator): share["accuracy"] for point, share in parts.items()}
    return {f"eval/{name}/{key}": value for key, value in found.items() if isinstance(value, float)}


def metric_name(testpoint: str, *, separator: str = " - ") -> str:
    """`Action - Hand` -> `Action.Action-Hand`; a testpoint without parts is its own name."""
    whole = primary(testpoint, separator=separator)
    joined = testpoint.replace(" - ", "-")
    return testpoint if whole == testpoint.strip() else f"{whole}.{joined}"


def losses(verdicts: Sequence[Verdict]) -> dict[str, int]:
    """How many images are there, were judged, are missing, have no answer, or one that cannot be read."""
    return {"images": len(verdicts)} | {
        key: sum(verdict.status == status for verdict in verdicts)
        for key, status in (("judged", "judged"), ("missing_images", "no_image"), ("unanswered", "no_answer"), ("unreadable", "unreadable"))
    }


def write_results(folder: Path, verdicts: Sequence[Verdict], summary: Mapping[str, object]) -> None:
    """`unigenbench_scores.csv`, a row for each image, and `unigenbench_summary.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "unigenbench_scores.csv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["index", "duplicate", "file", "prompt", "status", "testpoints", "scores", "analysis", "reason"])
        for v in sorted(verdicts, key=lambda v: (v.index, v.duplicate)):
            lists = [json.dumps(part, ensure_ascii=False) for part in (list(v.testpoints), v.scores, list(v.analysis))]
            rows.writerow([v.index, v.duplicate, v.file, v.prompt, v.status, *lists, v.reason])
    (folder / "unigenbench_summary.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
