"""Rewards for the form of an answer, and against repetition."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from lit_rl.errors import ConfigError
from lit_rl.rewards.base import TextReward
from lit_rl.types import Answer, Info

THINKING = r"<think>(?!.*<think>).*?</think>"
"""Thoughts between one pair of tags, then an answer."""
TAG = re.compile(r"[<\[◁][^<>\[\]◁▷]+[>\]▷]\s*")
TAGS = re.compile(f"(?:{TAG.pattern})*")


def matches(text: str, pattern: str) -> bool:
    """True when a text starts with a match of the pattern; `.` is any character, new lines too."""
    return re.match(pattern, text, re.DOTALL) is not None


def repetition_penalty(items: Sequence[Hashable], *, n: int, penalty: float) -> float:
    """penalty * (1 - different n-grams / n-grams): 0 where none comes twice, or there is none (Demystifying Long CoT, arXiv 2502.03373)."""
    grams = [tuple(items[i : i + n]) for i in range(len(items) - n + 1)]
    return (1 - len(set(grams)) / len(grams)) * penalty if grams else 0.0


class FormatReward(TextReward):
    """`format` = 1 where the answer starts as `pattern` says, else 0.

    A tag that the pattern names counts where the prompt opens it already, as the chat templates of thinking models do, and where it is a
    special token, which texts are shown without.

    Args:
        pattern: A regular expression; `.` is any character. Default: thoughts between <think> and </think>, once.
    """

    outputs = ("format",)
    highest = MappingProxyType({"format": 1.0})

    def __init__(self, pattern: str = THINKING) -> None:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"pattern={pattern!r} is no regular expression: {error}") from error
        self.pattern = pattern

    def score(self, media: Sequence[str], info: Sequence[Info]) -> Mapping[str, Tensor]:
        """See the class."""
        return {"format": torch.tensor([float(matches(self.whole(text), self.pattern)) for text in media])}

    def whole(self, answer: str) -> str:
        """An answer with the tags that the pattern names: those that the prompt opened, and those that are special tokens."""
        if not isinstance(answer, Answer):
            return answer
        text: str = answer
        if any(map(self.names, answer.special)):
            text = answer.written
            for token in answer.special:
                text = text if self.names(token) else text.replace(token, "")
        tags = TAG.findall(answer.opened) if TAGS.fullmatch(answer.opened) else None
        if tags is None:
            return answer.opened + text  # an answer that the prompt began in words
        first = next((i for i, tag in enumerate(tags) if self.names(tag)), len(tags))
        return "".join(tags[first:]) + text

    def names(self, tag: str) -> bool:
        """True when the pattern names a tag, as it stands or by its name: <(think|reason)>."""
        plain, name = self.pattern.replace("\\", ""), re.sub(r"\W", "", tag)
        return tag.strip() in plain or (len(name) > 2 and name in plain)


class RepetitionReward(TextReward):
    """`repetition` = penalty * (share of n-grams that are repeated), see `repetition_penalty`.

    Args:
        n: Words or characters in a row.
        penalty: Score of an answer that only repeats itself, below 0.
        of: What is counted.
    """

    outputs = ("repetition",)

    def __init__(self, *, n: int = 3, penalty: float = -1.0, of: Literal["words", "characters"] = "words") -> None:
        if n < 1 or penalty > 0:
            raise ConfigError(f"n={n} must be at least 1 and penalty={penalty} at most 0, e.g. n: 3, penalty: -1.0")
        self.n, self.penalty, self.of = n, penalty, of

    def score(self, media: Sequence[str], info: Sequence[Info]) -> Mapping[str, Tensor]:
        """See the class."""
        parts = [text.lower().split() if self.of == "words" else text for text in media]
        return {"repetition": torch.tensor([repetition_penalty(items, n=self.n, penalty=self.penalty) for items in parts])}
