"""Tokenizers of transformers, as far as types matter here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class Tokenizer(Protocol):
    """A tokenizer for one text at a time. transformers' own annotations name every result that a batch may have, too."""

    def __call__(self, text: str, **options: object) -> Any: ...

    def decode(self, token_ids: Sequence[int] | int, *, skip_special_tokens: bool = False) -> str: ...

    def __hash__(self) -> int: ...

    def __getattr__(self, name: str) -> Any: ...

    def __setattr__(self, name: str, value: object) -> None: ...


def read_tokenizer(pretrained: str, **source: object) -> Tokenizer:
    """The tokenizer of a folder or hub repository."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(pretrained, **source)
    return tokenizer
