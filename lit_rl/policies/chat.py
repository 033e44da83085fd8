"""Conversations as token ids, and which of them a policy answers for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lit_rl.errors import ConfigError
from lit_rl.policies.base import Message

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: "
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
"""For base models, whose tokenizer has none: "user: ...", a new line, "assistant: ", the answer and the end of text."""


def prompt_ids(tokenizer: Any, prompt: str | Sequence[Message], **template: Any) -> list[int]:
    """Token ids of a prompt, ready for an answer: a conversation through the chat template, a string as it is.

    A template writes the begin-of-text token itself where the model wants one; a string gets it from the tokenizer. An end of text that
    a tokenizer adds to strings is taken off.
    """
    if isinstance(prompt, str):
        ids = list(tokenizer(prompt).input_ids)
        return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids
    text = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=False, **template)
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def completion_ids(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], list[bool]]:
    """Ids of prompt, answer and end of text, and which of them are the answer's, its end included.

    Both are tokenized together, and the answer starts where that differs from the prompt alone: tokens may reach over the border.
    """
    start, ids = prompt_ids(tokenizer, prompt), prompt_ids(tokenizer, prompt + answer)
    common = next((i for i, (a, b) in enumerate(zip(start, ids)) if a != b), min(len(start), len(ids)))
    return [*ids, tokenizer.eos_token_id], [i >= common for i in range(len(ids) + 1)]


def conversation_ids(tokenizer: Any, messages: Sequence[Message], **template: Any) -> tuple[list[int], list[bool]]:
    """Ids of a conversation, and which of them the assistant wrote: each of its turns with the token that ends it.

    A template that marks them by `{% generation %}` is believed. Otherwise a turn is what the template adds to the conversation before it,
    and a ConfigError says so when it changes earlier turns instead (as those do that drop earlier thoughts).
    """
    messages = list(messages)
    if "{% generation" in tokenizer.chat_template or "{%- generation" in tokenizer.chat_template:
        marked = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True, **template)
        return list(marked["input_ids"]), [bool(m) for m in marked["assistant_masks"]]
    text = tokenizer.apply_chat_template(messages, tokenize=False, **template)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = [_span(tokenizer, messages, i, text, template) for i, m in enumerate(messages) if m["role"] == "assistant"]
    return list(encoded.input_ids), [
        any(a <= start and end <= b and start < end for a, b in spans) for start, end in encoded.offset_mapping
    ]


def _span(tokenizer: Any, messages: list[Message], turn: int, text: str, template: dict[str, Any]) -> tuple[int, int]:
    """Characters of one assistant turn in the whole text, from behind the generation prompt to its end token."""
    before = tokenizer.apply_chat_template(messages[:turn], add_generation_prompt=True, tokenize=False, **template) if turn else ""
    through = tokenizer.apply_chat_template(messages[: turn + 1], tokenize=False, **template)
    if not (text.startswith(through) and through.startswith(before)):
        raise ConfigError(
            f"the chat template changes earlier turns when turn {turn + 1} is added, so it cannot be told what the assistant wrote: "
            "supervise single answers (prompt and response), or set policy.chat_template to one with {% generation %} marks"
        )
    return len(before), len(through.rstrip("\n "))
