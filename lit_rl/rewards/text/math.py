"""Answers in \\boxed{}, as the MATH benchmark compares them (Hendrycks et al., arXiv 2103.03874)."""

from __future__ import annotations

import re

from lit_rl.rewards.text.verdict import Verdict

BOX = "\\boxed"


def math(answer: str, truth: str) -> Verdict:
    """1 if what stands in the last \\boxed{} equals the truth after both are normalized, else 0."""
    read = boxed(answer)
    right = read is not None and equal(read, truth)
    return Verdict(float(right), right, read)


def boxed(text: str) -> str | None:
    """The content of the last \\boxed{}, or the text from the last "\\boxed " to a dollar sign; None without one, or if it is open."""
    if f"{BOX} " in text:
        return text.rpartition(f"{BOX} ")[2].partition("$")[0]
    return braced(text.rpartition(BOX)[2]) if BOX in text else None


def braced(text: str) -> str | None:
    """The content of the braces that a text starts with."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return text[1:i] if i else None
    return None


def equal(a: str, b: str) -> bool:
    """True when two answers are equal after normalization, or equal as they are where normalization fails."""
    try:
        return normalize(a) == normalize(b)
    except NotUnderstoodError:
        return a == b


class NotUnderstoodError(ValueError):
    """LaTeX that the normalization does not know."""


REMOVED = ["\n", "\\!"]
REPLACED = [("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac")]
REMOVED_NEXT = ["\\left", "\\right", "^{\\circ}", "^\\circ", "\\$"]


def normalize(text: str) -> str:
    """An answer without spaces, units, degrees, percent; short fractions and roots written out; x=5 is 5, 1/2 and 0.5 are \\frac{1}{2}.

    The steps and their order are the benchmark's, on which published numbers depend.
    """
    for part in REMOVED:
        text = text.replace(part, "")
    for old, new in REPLACED:
        text = text.replace(old, new)
    for part in REMOVED_NEXT:
        text = text.replace(part, "")
    text = _without_units(text).replace("\\\\%", "").replace("\\%", "")
    text = text.replace(" .", " 0.").replace("{.", "{0.")
    text = "0" + text if text.startswith(".") else text
    name, equals, value = text.partition("=")
    if equals and "=" not in value and len(name) <= 2:
        text = value
    text = _fractions(_roots(text).replace(" ", ""))
    if text == "0.5":
        return "\\frac{1}{2}"
    return re.sub(r"\A(0|-?[1-9][0-9]*)/(0|-?[1-9][0-9]*)\Z", r"\\frac{\1}{\2}", text)


def _without_units(text: str) -> str:
    before, unit, after = text.partition("\\text{ ")
    if unit and unit in after:
        raise NotUnderstoodError("two units")
    return before


def _roots(text: str) -> str:
    head, *roots = text.split("\\sqrt")
    if not all(roots):
        raise NotUnderstoodError("a root of nothing")
    return head + "".join("\\sqrt" + (root if root[0] == "{" else f"{{{root[0]}}}{root[1:]}") for root in roots)


def _fractions(text: str) -> str:
    """\\frac12 -> \\frac{1}{2}, \\frac1{72} -> \\frac{1}{72}; as it is where a fraction has one digit only."""
    head, *fractions = text.split("\\frac")
    written = head
    for fraction in fractions:
        if not fraction:
            raise NotUnderstoodError("a fraction of nothing")
        if fraction[0] == "{":
            written += "\\frac" + fraction
        elif len(fraction) == 1:
            return text
        else:
            above, below, rest = fraction[0], fraction[1], fraction[2:]
            written += f"\\frac{{{above}}}" + (below if below == "{" else f"{{{below}}}") + rest
    return written
