"""Answers after "Answer:", as DAPO asks for them (arXiv 2503.14476), compared by Minerva's normalization (arXiv 2206.14858, listing 1)."""

from __future__ import annotations

import re

from lit_rl.rewards.text.math import braced
from lit_rl.rewards.text.verdict import Verdict

LOOKED_AT = 300
"""Characters at the end of an answer; the longest of MATH-500 has 159."""
LOOKED_AT_FOR_BOX = 100
NOTHING = "[INVALID]"

REPLACED = [
    *[("an ", ""), ("a ", ""), (".$", "$"), ("\\$", ""), ("\\ ", ""), (" ", ""), ("mbox", "text")],
    *[(",\\text{and}", ","), ("\\text{and}", ","), ("\\text{m}", "\\text{}")],
]
UNITS = """square ways integers dollars mph inches hours km units \\ldots sue points feet minutes digits cents degrees cm gm pounds
meters meals edges students childrentickets multiples \\text{s} \\text{.}"""
REMOVED = [
    *UNITS.split(),
    *["\\text{\ns}", "\\text{}^2", "\\text{}^3", "\\text{\n}", "\\text{}"],
    *["\\mathrm{th}", "^\\circ", "^{\\circ}", "\\;", ",\\!", "{,}", '"', "\\dots"],
]
KEPT = [(r"(.*?)(\$)(.*?)(\$)(.*)", r"$\3$"), *[(rf"(\\{name}{{)(.*?)(}})", r"\2") for name in ("text", "textbf", "overline")]]
"""Formulas and commands of which only the content is kept."""


def math_dapo(answer: str, truth: str) -> Verdict:
    """1 if what follows the last "Answer:" equals the truth after both are normalized, else -1."""
    found = re.findall(r"(?i)Answer\s*:\s*([^\n]+)", answer[-LOOKED_AT:])
    read = normalize(found[-1] if found else NOTHING)
    right = read == normalize(truth)
    return Verdict(1.0 if right else -1.0, right, read if found else None)


def math_dapo_boxed(answer: str, truth: str) -> Verdict:
    """1 if what stands in the last \\boxed{} of the last hundred characters is the truth, letter for letter, else -1."""
    _, box, rest = answer[-LOOKED_AT_FOR_BOX:].rpartition("\\boxed{")
    read = braced("{" + rest) if box else None
    right = read is not None and read == truth
    return Verdict(1.0 if right else -1.0, right, read)


def normalize(text: str) -> str:
    """An answer without words, units and dollar signs; short fractions and roots written out; 1,000 is 1000."""
    text = text.split("=")[-1]
    for old, new in REPLACED:
        text = text.replace(old, new)
    for part in REMOVED:
        text = text.replace(part, "")
    for pattern, kept in KEPT:
        text = re.sub(pattern, kept, text)
    text = re.sub(r"(\\boxed\{)(.*)(\})", r"\2", text)
    text = re.sub(r"(frac)([^{])(.)", r"frac{\2}{\3}", text)
    text = re.sub(r"(sqrt)([^{])", r"sqrt{\2}", text).replace("$", "")
    digits = text.replace(",", "")
    return (digits if digits.isdigit() else text).strip()
