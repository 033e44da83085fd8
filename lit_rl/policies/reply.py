"""A language model's token ids as an answer: its text, and its special tokens for rewards on its form."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lit_rl.policies.tokenizer import Tokenizer
from lit_rl.types import Answer, Info

OPENED = re.compile(r"(?:[<\[◁](?![/|｜\s])[^<>\[\]◁▷\s]{1,40}[>\]▷]\s*)+\Z")
"""Tags at the end of a prompt that open something: <think>, [THINK], ◁think▷; neither </think> nor role tokens such as <|assistant|>."""
LOOKED_AT = 64
"""Tokens at the end of a prompt."""


def reply(
    tokenizer: Tokenizer,
    ids: Sequence[int],
    *,
    prompt_ids: Sequence[int],
    info: Info,
    stop_ids: Sequence[int],
    text: str | None = None,
) -> Answer:
    """An answer's text without special tokens (default: as the tokenizer has it); `written` has them, but for those that end it; `opened`
    is what the prompt began of it."""
    text = tokenizer.decode(list(ids), skip_special_tokens=True) if text is None else text
    end = len(ids)
    while end and ids[end - 1] in stop_ids:
        end -= 1
    special = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    kept = frozenset(special[i] for i in ids[:end] if i in special)
    written = tokenizer.decode(list(ids[:end]), skip_special_tokens=False) if kept else text
    return Answer(text, opened=opened(tokenizer, prompt_ids, info), written=written, special=kept)


def opened(tokenizer: Tokenizer, prompt_ids: Sequence[int], info: Info) -> str:
    """The part of the answer that stands in its prompt: the assistant's message that it continues, else tags such as <think>."""
    prompt = info.get("prompt")
    last = prompt[-1] if isinstance(prompt, list) and prompt else {}
    said = last.get("content") if last.get("role") == "assistant" else None
    if isinstance(said, str) and tokenizer.decode(list(prompt_ids), skip_special_tokens=False).rstrip().endswith(said.rstrip()):
        return said
    found = OPENED.search(tokenizer.decode(list(prompt_ids[-LOOKED_AT:]), skip_special_tokens=False))
    return found[0] if found else ""
