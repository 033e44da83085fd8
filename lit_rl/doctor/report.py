"""Findings of checks, and how they are shown."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

Status = Literal["ok", "warning", "problem"]
COLOURS: dict[str, str] = {"ok": "green", "warning": "yellow", "problem": "red"}


@dataclass(frozen=True)
class Finding:
    """One sentence about one thing; of a warning or a problem it says what to do."""

    status: Status
    about: str
    text: str


def ok(about: str, text: str) -> Finding:
    """A finding without a problem."""
    return Finding("ok", about, text)


def warning(about: str, text: str) -> Finding:
    """A finding that may be a problem."""
    return Finding("warning", about, text)


def problem(about: str, text: str) -> Finding:
    """A finding that keeps a run from working."""
    return Finding("problem", about, text)


def count(findings: Iterable[Finding], status: Status) -> int:
    """Number of findings of a kind."""
    return sum(finding.status == status for finding in findings)


def as_json(findings: Sequence[Finding]) -> str:
    """The findings as JSON."""
    totals = {"problems": count(findings, "problem"), "warnings": count(findings, "warning")}
    return json.dumps({**totals, "findings": [asdict(finding) for finding in findings]}, indent=1, ensure_ascii=False)


def show(findings: Sequence[Finding]) -> None:
    """A line each, and a last one that sums up."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    for finding in findings:
        console.print(Text(f"{finding.status:<8}", COLOURS[finding.status]), f"{finding.about}: {finding.text}", sep="", markup=False)
    problems, warnings = count(findings, "problem"), count(findings, "warning")
    console.print(f"{_number(problems, 'problem')}, {_number(warnings, 'warning')}, {count(findings, 'ok')} ok", markup=False)


def gigabytes(size: float) -> str:
    """A number of bytes, in words."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _number(value: int, what: str) -> str:
    return f"{value or 'no'} {what}{'' if value == 1 else 's'}"
