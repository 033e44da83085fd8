"""Similarity of a text that was read to the text that was wanted, blind for differences that nobody can see in a picture."""

from __future__ import annotations

import unicodedata
from typing import Literal

How = Literal["compact", "exact"]

_ALIKE = {
    "-": "‐‑‒–—―−﹘﹣－",
    "'": "‘’‚‛′‵ʹʼ`´＇｀❛❜",
    '"': "“”„‟″‶＂〝〞〟❝❞",
    ".": "。｡．",
    ",": "、､，﹐",
    "...": "…⋯",
    "·": "・･‧∙⋅",
    "~": "～〜∼",
    "/": "⁄∕",
    "μ": "µ",
}
_TABLE: dict[int, str | None] = {ord(c): plain for plain, group in _ALIKE.items() for c in group}
_TABLE |= {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F) if code not in _TABLE}  # full-width forms of ASCII
_TABLE |= {code: unicodedata.normalize("NFKC", chr(code)) for code in (*range(0xFB00, 0xFB07), *range(0xFF66, 0xFFA0))}  # ligatures, kana
_TABLE |= {code: None for code in (*range(0xFE00, 0xFE10), 0x034F)}  # variation selectors, grapheme joiner


def fold(text: str) -> str:
    """One spelling for what looks the same in a picture, in NFC and without invisible characters.

    Hyphens, dashes and minus -> `-`; apostrophes, accents used as such and single quotes -> `'`; double quotes and '' -> `"`; `…` ->
    `...`; full-width and half-width forms, ideographic stops, commas, spaces -> ASCII; ligatures -> their letters; half-width kana -> full.
    Every white space -> a space. Letters, digits and case stay: `O` is not `0`, `é` not `e`, `½` not `1/2`.
    """
    text = unicodedata.normalize("NFC", text.translate(_TABLE)).replace("''", '"')
    text = "".join(" " if c.isspace() else c for c in text)
    return "".join(c for c in text if unicodedata.category(c) not in ("Cf", "Cc"))


def is_visible(text: str) -> bool:
    """True if there is something to be seen: neither white space nor invisible characters alone."""
    return bool(fold(text).strip())


def normalize(text: str, how: How) -> str:
    """`compact`: folded, in lower case, without white space, as Flow-GRPO compares; `exact`: folded, without surrounding white space."""
    text = fold(text)
    return unicodedata.normalize("NFC", "".join(text.lower().split())) if how == "compact" else " ".join(text.split())


def similarity(read: str, target: str, *, how: How = "compact", anywhere: bool = False) -> float:
    """max(0, 1 - Levenshtein(read, target) / len(target)) of normalized texts, in [0, 1] (Flow-GRPO, arXiv 2505.05470, section 4).

    anywhere: a reading that contains the target counts 1, as in the authors' code. Off by default: it pays for writing more.
    """
    from rapidfuzz.distance import Levenshtein

    got, want = normalize(read, how), normalize(target, how)
    if got == want or (anywhere and want in got):
        return 1.0
    return max(0.0, 1.0 - Levenshtein.distance(got, want) / max(1, len(want)))
