"""Numbers behind "####", as GSM8K writes its answers (arXiv 2110.14168)."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from typing import Literal

from lit_rl.rewards.text.verdict import Verdict

LOOKED_AT = 300
"""Characters at the end of an answer that are searched: a regular expression over a long text is slow."""

Method = Literal["strict", "flexible"]


def gsm8k(answer: str, truth: str, *, method: Method = "strict", format_score: float = 0.0) -> Verdict:
    """1 if the number in the answer is the truth, letter for letter; `format_score` for another number, 0 for none. verl's rule.

    strict: the last number after "#### ", without commas; flexible: the last number anywhere, as it is written, so that neither "1,000"
    nor "18." are right where the truth is 1000 and 18: `gsm8k_robust` compares as numbers.
    """
    read = extract(answer, method)
    return Verdict(1.0 if read == truth else format_score if read is not None else 0.0, read is not None and read == truth, read)


def extract(answer: str, method: Method) -> str | None:
    """The number that an answer gives, or None."""
    end = answer[-LOOKED_AT:]
    if method == "strict":
        found = re.findall(r"#### (-?[0-9.,]+)", end)
        return found[-1].replace(",", "") if found else None
    found = re.findall(r"-?[0-9.,]+", end)
    return next((number for number in reversed(found) if number != "."), found[0] if found else None)


def gsm8k_robust(answer: str, truth: str, *, format_score: float = 0.0) -> Verdict:
    """As `gsm8k`, compared as numbers: "####18", "#### $18.00", "#### 1,234." are right where the truth is 18 and 1234."""
    found = re.findall(r"####\s*(-?)\s*\$?\s*(-?[0-9.,]*[0-9])", answer[-LOOKED_AT:])
    if not found:
        return Verdict(0.0, False, None)
    read = "".join(found[-1])
    mine, true = number(read), number(truth)
    right = read == truth if mine is None or true is None else mine == true
    return Verdict(1.0 if right else format_score, right, read)


def number(text: str) -> Decimal | None:
    """1,234.50 -> Decimal; None for what is not one."""
    try:
        return Decimal(text.strip().replace(",", "").removeprefix("$").removesuffix("."))
    except InvalidOperation:
        return None
