"""Tokenizers of transformers, as far as types matter here."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Sequence
from typing import Any, Protocol


class Tokenizer(Protocol):
    """A tokenizer. transformers' own annotations name every result that one text or many may have."""

    def __call__(self, text: str | list[str], **options: object) -> Any: ...

    def decode(self, token_ids: Sequence[int] | int, *, skip_special_tokens: bool = False) -> str: ...

    def __hash__(self) -> int: ...

    def __getattr__(self, name: str) -> Any: ...

    def __setattr__(self, name: str, value: object) -> None: ...


def read_tokenizer(pretrained: str, **source: object) -> Tokenizer:
    """The tokenizer of a folder or hub repository."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(pretrained, **source)
    return tokenizer


def fingerprint(tokenizer: Tokenizer) -> str | None:
    """It differs where ids or templates do; None for tokenizers that run other code than transformers' and tokenizers'."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not type(tokenizer).__module__.startswith(("transformers.", "tokenizers.")):
        return None
    template = repr(tokenizer.chat_template)
    today = datetime.date.today().isoformat() if "strftime_now" in template else ""  # templates that write the date
    told = repr((type(tokenizer).__qualname__, repr(tokenizer), template, today))
    return hashlib.sha256(f"{backend.to_str()}{told}".encode()).hexdigest()
