"""Conversations as token ids, and which of them a policy answers for."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import SupportsIndex, overload

from lit_rl.errors import ConfigError
from lit_rl.policies.base import Message
from lit_rl.policies.chat_template import render, source, without_ends
from lit_rl.policies.chat_turns import Conversation, Turn
from lit_rl.policies.tokenizer import Tokenizer

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: "
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
"""For base models, whose tokenizer has none: "user: ...", a new line, "assistant: ", the answer and the end of text."""

SWITCHES = ("weight", "train", "train_on_turn", "training", "loss")
"""Fields by which data say that a message of the assistant is learned, or is not (OpenAI; axolotl; ms-swift)."""


class AnswerIds(list[int]):
    """Token ids of an answer, and which of them are learned: in an answer of several turns not what others say in between."""

    def __init__(self, ids: Sequence[int], learned: Sequence[bool]) -> None:
        super().__init__(ids)
        self.learned = list(learned)

    @overload
    def __getitem__(self, key: SupportsIndex) -> int: ...
    @overload
    def __getitem__(self, key: slice) -> AnswerIds: ...
    def __getitem__(self, key: SupportsIndex | slice) -> int | AnswerIds:
        return AnswerIds(super().__getitem__(key), self.learned[key]) if isinstance(key, slice) else super().__getitem__(key)


# ---------------------------------------------------------------------- texts as they are


def prompt_ids(tokenizer: Tokenizer, prompt: str | Sequence[Message], **template: object) -> list[int]:
    """Token ids of a prompt, ready for an answer: a conversation through the chat template, a string as it is.

    A template writes the begin-of-text token itself where the model wants one; a string that does not hold it gets it from the tokenizer.
    An end of text that a tokenizer adds to strings is left out, one that the string holds stays. A conversation that ends in a message
    of the assistant's is continued there.
    """
    if isinstance(prompt, str):
        return _begun(*(list(tokenizer(prompt, add_special_tokens=special).input_ids) for special in (False, True)))
    return list(tokenizer(prompt_text(tokenizer, prompt, **template), add_special_tokens=False).input_ids)


def many_prompt_ids(
    tokenizer: Tokenizer, prompts: Sequence[str | Sequence[Message]], templates: Sequence[Mapping[str, object]]
) -> list[list[int]]:
    """`prompt_ids` of each prompt, of which many take a fraction of the time. templates: The template's arguments, for each prompt."""
    if not prompts:
        return []
    texts = [p if isinstance(p, str) else prompt_text(tokenizer, p, **template) for p, template in zip(prompts, templates, strict=True)]
    bare = {"return_attention_mask": False, "return_token_type_ids": False}
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, **bare).input_ids
    strings = [i for i, prompt in enumerate(prompts) if isinstance(prompt, str)]
    if strings and tokenizer.num_special_tokens_to_add():
        whole = tokenizer([texts[i] for i in strings], add_special_tokens=True, **bare).input_ids
        for i, with_special in zip(strings, whole, strict=True):
            ids[i] = _begun(ids[i], with_special)
    return ids


def _begun(own: list[int], whole: list[int]) -> list[int]:
    """A string's ids behind what the tokenizer puts before it, which the string may hold itself. whole: Those with all that it adds."""
    before = next((n for n in range(len(whole) - len(own) + 1) if whole[n : n + len(own)] == own), 0) if own else 0
    return own if own[:before] == whole[:before] else whole[:before] + own


def prompt_text(tokenizer: Tokenizer, messages: Sequence[Message], **template: object) -> str:
    """The text of a conversation that `prompt_ids` tokenizes."""
    last, before = messages[-1], without_ends(tokenizer, messages[:-1], template=template)
    if last["role"] != "assistant":
        return render(tokenizer, [*before, last], add_generation_prompt=True, **template)
    if not last.get("content") or last.get("tool_calls"):
        raise ConfigError("ends in a message of the assistant's without a text that could be continued: end it in another one")
    return render(tokenizer, [*before, last], continue_final_message=True, **template)


def completion_ids(tokenizer: Tokenizer, prompt: str, answer: str, *, end: int | None = None) -> tuple[list[int], list[bool]]:
    """Ids of prompt, answer and end of text, and which of them are the answer's, its end included.

    Both are tokenized together, and the answer starts where that differs from the prompt alone: tokens may reach over the border.
    end: The token that ends it, default the tokenizer's end of text; an answer that is written with it gets no second one.
    """
    end = tokenizer.eos_token_id if end is None else end
    if end is None:
        raise ConfigError("the tokenizer has no end-of-text token, so nothing ends an answer: set its eos_token")
    start, ids = prompt_ids(tokenizer, prompt), prompt_ids(tokenizer, prompt + answer)
    common = next((i for i, (a, b) in enumerate(zip(start, ids)) if a != b), min(len(start), len(ids)))
    ids = ids if ids[common:] and ids[-1] == end else [*ids, end]
    return ids, [i >= common for i in range(len(ids))]


# ---------------------------------------------------------------------- conversations


def conversation_ids(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    first: int = 0,
    prefill: int = 0,
    stop_ids: Collection[int] = (),
    **template: object,
) -> tuple[list[int], list[bool]]:
    """Ids of a conversation as the chat template writes it, and which of them are learned: what the assistant says in each of its turns,
    from behind the generation prompt to the token that ends the turn.

    A turn is learned as it stands in the whole conversation: thoughts that a template drops from earlier turns are not. Of a template that
    marks what is learned by `{% generation %}` nothing beside the marks is, but the end of a marked turn. Messages that say so
    (`weight: 0`, `train: false`) are not learned. Where a template ends the last turn by no token, the end of text is appended.

    first: Messages before this one are not learned. prefill: Characters of message `first` that the prompt already holds. stop_ids: Tokens
    that end answers beside those of the template. Raises ConfigError where the template refuses the conversation.
    """
    stops = {tokenizer.convert_ids_to_tokens(i) for i in stop_ids}
    talk = Conversation(tokenizer, messages, template, stops, (first, prefill) if prefill else (-1, 0))
    said = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= first]
    turns = [turn for i in said if is_learned(messages[i]) and (turn := talk.turn(i)) is not None]
    text, open_end = talk.text, bool(turns) and turns[-1].message == len(messages) - 1 and turns[-1].end == turns[-1].stop
    if open_end:
        text = text[: turns[-1].stop]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, places = list(encoded.input_ids), encoded.offset_mapping
    mask = [_inside(place, [(turn.start, turn.stop) for turn in turns]) for place in places]
    marks = _marks(tokenizer, talk.messages, template)
    if marks is not None:
        mask = [m and (marked or end) for m, marked, end in zip(mask, marks, _ends_of_marked(places, marks, turns))]
    if open_end:
        ids, mask = [*ids, _end_id(tokenizer, talk)], [*mask, True]
    return ids, mask


def _end_id(tokenizer: Tokenizer, talk: Conversation) -> int:
    own = talk.ends.all
    end = tokenizer.convert_tokens_to_ids(own[0]) if own else tokenizer.eos_token_id
    if end is None:
        raise ConfigError("the chat template ends an answer by no token and the tokenizer has no end of text: set its eos_token")
    return int(end)


def _inside(place: tuple[int, int], spans: Sequence[tuple[int, int]]) -> bool:
    """A token that reaches over a border is learned: the policy has to say it."""
    return any(place[0] < stop and place[1] > start for start, stop in spans) and place[0] < place[1]


def _marks(tokenizer: Tokenizer, messages: list[Message], template: dict[str, object]) -> list[bool] | None:
    """By token, what a template marks as the assistant's; None where it marks nothing."""
    if not re.search(r"{%-?\s*generation\s*-?%}", source(tokenizer, **template)):
        return None
    marked = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True, **template)
    return [bool(m) for m in marked["assistant_masks"]]


def _ends_of_marked(places: Sequence[tuple[int, int]], marks: Sequence[bool], turns: Sequence[Turn]) -> list[bool]:
    """By token, the end of a turn of which something is marked."""
    seen = [turn for turn in turns if any(m and _inside(place, [(turn.start, turn.end)]) for m, place in zip(marks, places))]
    return [_inside(place, [(turn.end, turn.stop) for turn in seen]) for place in places]


def is_learned(message: Message) -> bool:
    """True unless a message says that it is not learned."""
    return all(message.get(name) is None or bool(message[name]) for name in SWITCHES)


def conversation_of(prompt: Sequence[Message], answer: Sequence[Message]) -> tuple[list[Message], int, int]:
    """A prompt and its answer as one conversation, the number of the first message that is the answer's, and how many characters of that
    one are the prompt's: an answer to a prompt that ends in the assistant's own words continues them."""
    if prompt and answer and prompt[-1]["role"] == answer[0]["role"] == "assistant":
        begun = str(prompt[-1].get("content") or "")
        whole = {**prompt[-1], **answer[0], "content": begun + str(answer[0].get("content") or "")}
        return [*prompt[:-1], whole, *answer[1:]], len(prompt) - 1, len(begun)
    return [*prompt, *answer], len(prompt), 0


def answer_ids(
    tokenizer: Tokenizer,
    prompt: Sequence[Message],
    answer: Sequence[Message],
    *,
    stop_ids: Collection[int] = (),
    **template: object,
) -> tuple[list[int], AnswerIds]:
    """Ids of a prompt and of the turns that answer it, up to the end of the last one that is learned.

    The answer starts at its first learned token, and not before the second of all, for nothing predicts the first.
    """
    messages, first, prefill = conversation_of(prompt, answer)
    ids, mask = conversation_ids(tokenizer, messages, first=first, prefill=prefill, stop_ids=stop_ids, **template)
    if True not in mask:
        return ids, AnswerIds([], [])
    start, stop = max(1, mask.index(True)), len(mask) - mask[::-1].index(True)
    return ids[:start], AnswerIds(ids[start:stop], mask[start:stop])
