"""Scores of texts that OCR read against all that a prompt quotes, as DeepGen-RL's two scorers compute them."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from lit_rl.errors import ConfigError
from lit_rl.rewards.quotes import SHOWN
from lit_rl.types import Info

Token = tuple[str, float]
"""A line that was read, and the confidence in it."""

_FOLDED = str.maketrans({"0": "o", "1": "l", "i": "l", "j": "l", "5": "s", "v": "w"})


def first_quoted(prompt: str, tokens: Sequence[Token]) -> float:
    """1 - min(d, n) / n of the text between the first two `"`, n its length: DeepGen-RL's scorer `old`; NaN where nothing is quoted.

    All tokens with a confidence above 0 are joined. Case and spaces do not count; d is 0 where what was read contains the text, else the
    Levenshtein distance.
    """
    from rapidfuzz.distance import Levenshtein

    parts = prompt.split('"')
    target = parts[1].replace(" ", "").lower() if len(parts) > 1 else ""
    if not target:
        return math.nan
    read = "".join(text for text, confidence in tokens if confidence > 0).replace(" ", "").lower()
    distance = 0 if target in read else min(Levenshtein.distance(read, target), len(target))
    return 1 - distance / len(target)


@dataclass(frozen=True, kw_only=True)
class AllQuoted:
    """sum n_i (1 - d_i / n_i) / sum n_i over all texts between `"`, n_i their lengths: DeepGen-RL's scorer `new`.

    d_i is the smallest Levenshtein distance, n_i at most, to a token, to up to `ngrams` tokens in a row, or to all of them together.

    Args:
        min_confidence: Tokens below it do not count.
        ngrams: Tokens in a row that may make up a text.
        case_sensitive: Upper and lower case differ.
        ignore_punctuation: Only letters and digits count; otherwise all but white space.
        fold: 0 and o, 1, i, j and l, 5 and s, v and w are the same.
    """

    min_confidence: float = 0.0
    ngrams: int = 3
    case_sensitive: bool = True
    ignore_punctuation: bool = True
    fold: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.min_confidence <= 1 or self.ngrams < 1:
            raise ConfigError(f"min_confidence={self.min_confidence} must lie in [0, 1], ngrams={self.ngrams} must be at least 1")

    @classmethod
    def from_environment(cls) -> AllQuoted:
        """The settings of OCR_MIN_CONF, OCR_NGRAM_MAX, OCR_CASE_SENSITIVE, OCR_IGNORE_PUNCT, OCR_USE_CONFUSION_FOLD where they are set."""
        try:
            return cls(
                min_confidence=float(os.environ.get("OCR_MIN_CONF") or 0.0),
                ngrams=int(os.environ.get("OCR_NGRAM_MAX") or 3),
                case_sensitive=_switch("OCR_CASE_SENSITIVE"),
                ignore_punctuation=_switch("OCR_IGNORE_PUNCT"),
                fold=_switch("OCR_USE_CONFUSION_FOLD"),
            )
        except ValueError as error:
            raise ConfigError(f"OCR_MIN_CONF or OCR_NGRAM_MAX in the environment is no number: {error}") from error

    def __call__(self, prompt: str, tokens: Sequence[Token]) -> float:
        """The score; NaN where nothing is quoted that counts."""
        from rapidfuzz.distance import Levenshtein

        targets = [text for part in re.findall(r'"([^"]*)"', prompt) if (text := self._plain(part))]
        if not targets:
            return math.nan
        texts = [plain for text, confidence in tokens if confidence >= self.min_confidence and (plain := self._plain(text))]
        runs = {"".join(texts[i : i + n]) for n in (*range(1, self.ngrams + 1), len(texts)) for i in range(len(texts) - n + 1)}
        right = sum(len(target) - min([Levenshtein.distance(run, target) for run in runs] + [len(target)]) for target in targets)
        return right / sum(map(len, targets))

    def _plain(self, text: str) -> str:
        text = text if self.case_sensitive else text.lower()
        text = "".join(letter for letter in text if (letter.isalnum() if self.ignore_punctuation else not letter.isspace()))
        return text.translate(_FOLDED) if self.fold else text


def check_quoted(rows: Iterable[Info], grade: Callable[[str, Sequence[Token]], float] = first_quoted) -> None:
    """Raise ConfigError that names prompts in which a scorer finds no text to look for."""
    wrong = [row for row in rows if math.isnan(grade(str(row["prompt"]), []))]
    if wrong:
        shown = [f"{row.get('where') or row.get('id') or 'prompt'}: {str(row['prompt'])[:200]!r}" for row in wrong[:SHOWN]]
        head = f'{len(wrong)} prompts quote no text ("OPEN") that OCR could look for; give their rows other rewards (reward_weights)'
        raise ConfigError("\n  ".join([head, *shown, *([f"... and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else [])]))


def _switch(variable: str) -> bool:
    text = os.environ.get(variable, "").strip() or "1"
    if text not in ("0", "1"):
        raise ConfigError(f"{variable}={text} in the environment must be 0 or 1")
    return text == "1"
