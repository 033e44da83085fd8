"""Chat templates: programs that write conversations, may refuse them, and tell only by what they write where an answer ends."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from lit_rl.errors import ConfigError
from lit_rl.policies.base import Message
from lit_rl.policies.tokenizer import Tokenizer

log = logging.getLogger(__name__)

MARK = "\ue000answer\ue001"
"""A content that no text has: of Unicode's private use, so that no template trims or looks for it."""
OTHER = "\ue002question\ue003"
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of a message's thoughts; transformers gives each of them to a template."""

CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "brave_search", "arguments": {MARK: MARK}}}


def render(tokenizer: Tokenizer, messages: Sequence[Message], **template: object) -> str:
    """The conversation as the chat template writes it. Raises ConfigError with the template's own words where it refuses it.

    template: For the template: tools, add_generation_prompt, enable_thinking, ...
    """
    return accepted(tokenizer, messages, **template)[1]


def accepted(tokenizer: Tokenizer, messages: Sequence[Message], **template: object) -> tuple[list[Message], str]:
    """The messages in the spelling that the template takes, and what it writes."""
    check_tools(tokenizer, messages, **template)
    refusal: Exception | None = None
    for spelled in _spellings(messages):
        try:
            return spelled, tokenizer.apply_chat_template(spelled, tokenize=False, **template)
        except Exception as error:  # templates are programs: they refuse roles and orders of turns in their own ways
            refusal = error
    roles = [message["role"] for message in messages]
    raise ConfigError(f"the chat template refuses the conversation with roles {roles}: {refusal}") from refusal


def check_tools(tokenizer: Tokenizer, messages: Sequence[Message], **template: object) -> None:
    """Raise ConfigError where there are tools, or calls of them, and the template writes none."""
    for name, present in {"tools": template.get("tools"), "tool_calls": any(message.get("tool_calls") for message in messages)}.items():
        if present and name not in source(tokenizer, **template):
            raise ConfigError(
                f"{name}: the chat template does not write them: set model.policy.chat_template to one that does, or take them out"
            )


def _spellings(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """As they are (arguments of calls as objects: what transformers documents), and for templates that fail on it with arguments as JSON
    text (DeepSeek), and with an empty content beside calls."""
    given = [dict(message) for message in messages]
    yield given
    texts = [_arguments_as_text(message) for message in given]
    if texts != given:
        yield texts
    if any("content" not in message for message in given):
        yield [{"content": "", **message} for message in given]
        yield [{"content": "", **message} for message in texts]


def _arguments_as_text(message: Message) -> Message:
    calls = message.get("tool_calls")
    return {**message, "tool_calls": [_call_as_text(call) for call in calls]} if isinstance(calls, list | tuple) and calls else message


def _call_as_text(call: object) -> object:
    if not isinstance(call, dict):
        return call
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), dict):
        return call
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def source(tokenizer: Tokenizer, **template: object) -> str:
    """The template's text. Raises ConfigError where the tokenizer has several and none for this."""
    try:
        return str(tokenizer.get_chat_template(tools=template.get("tools")))
    except ValueError as error:
        raise ConfigError(f"the tokenizer's chat template cannot be used ({error}): set model.policy.chat_template") from error


def check_template(tokenizer: Tokenizer) -> None:
    """Raise ConfigError where the template's text is none."""
    from jinja2 import TemplateSyntaxError

    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    except TemplateSyntaxError as error:
        raise ConfigError(f"the chat template is not one, line {error.lineno}: {error}; set model.policy.chat_template") from error
    except Exception:  # what it refuses is told of the rows that hold it
        log.debug("the chat template refuses a user's message alone", exc_info=True)


# ---------------------------------------------------------------------- where an answer ends


def without_ends(
    tokenizer: Tokenizer, messages: Sequence[Message], *, stops: Collection[str] = (), template: Mapping[str, object]
) -> list[Message]:
    """The messages, the assistant's without a token that ends a turn behind their text: data that were rendered once hold it, and the
    template writes it again. stops: Further strings that end answers."""
    ends = any_of([*turn_ends(tokenizer, **template).all, *stops]).pattern
    return [
        {**message, "content": re.sub(rf"(?:{ends})\s*\Z", "", content)}
        if message["role"] == "assistant" and isinstance(content := message.get("content"), str)
        else message
        for message in messages
    ]


@dataclass(frozen=True)
class Ends:
    """The end of an assistant's turn in a template.

    stops: Strings of control tokens that end a conversation's last turn, a call of tools among them; empty: the template writes none.
    inside: Those that end a turn which is followed by another one. text: What stands behind an answer where no token does.
    opening: The generation prompt, as far as it is only appended.
    """

    stops: tuple[str, ...]
    inside: tuple[str, ...]
    text: str
    opening: str

    @property
    def all(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys([*self.stops, *self.inside]))


def turn_ends(tokenizer: Tokenizer, **template: object) -> Ends:
    """Found by having the template write short conversations."""
    kwargs = {name: value for name, value in template.items() if name != "tools"}
    return _turn_ends(tokenizer, source(tokenizer), json.dumps(kwargs, sort_keys=True, default=repr), _Hidden(kwargs))


class _Hidden:
    """Arguments that the cache does not look at."""

    def __init__(self, kwargs: dict[str, object]) -> None:
        self.kwargs = kwargs

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hidden)

    def __hash__(self) -> int:
        return 0


@lru_cache(maxsize=8)
def _turn_ends(tokenizer: Tokenizer, text: str, key: str, hidden: _Hidden) -> Ends:
    kwargs = hidden.kwargs
    question: list[Message] = [{"role": "user", "content": OTHER}]
    answer: Message = {"role": "assistant", "content": MARK}
    begin = next(
        (b for b in ([], [{"role": "system", "content": "s"}]) if _tried(tokenizer, [*b, *question, answer], kwargs) is not None), []
    )
    last = _behind(_tried(tokenizer, [*begin, *question, answer], kwargs))
    inside = _behind(_tried(tokenizer, [*begin, *question, answer, *question], kwargs)).partition(OTHER)[0]
    before = _tried(tokenizer, [*begin, *question], kwargs) or ""
    opened = _tried(tokenizer, [*begin, *question], kwargs | {"add_generation_prompt": True}) or ""
    opening = opened[len(before) :] if opened.startswith(before) else ""
    header = before.partition(OTHER)[0].removeprefix(tokenizer.bos_token or "")
    headers = {*controls(tokenizer, opening), *controls(tokenizer, header)}
    final = controls(tokenizer, last)[:1]
    middle = [token for token in controls(tokenizer, inside)[:1] if token not in headers]
    stops = final or middle
    for options in [{}, {"builtin_tools": ["brave_search"]}] if "tool_calls" in text else []:
        called = _behind(_tried(tokenizer, [*begin, *question, {"role": "assistant", "tool_calls": [CALL]}], kwargs | options))
        found = controls(tokenizer, called)
        stops = [*stops, *([] if set(found) & set(stops) else found[-1:])]
    if not stops:
        wanted = f" but {last.strip()!r}" if last.strip() else ""
        log.warning(
            "the chat template ends an answer by no token%s: %s is appended to the answers that are learned, and only it ends one",
            wanted,
            tokenizer.eos_token,
        )
    return Ends(tuple(dict.fromkeys(stops)), tuple(middle), "" if stops else last.rstrip(), opening)


def stored_stop_ids(pretrained: str, revision: str) -> list[int]:
    """The ends of text that generation_config.json and config.json of a model name, in this order."""
    from transformers.utils import cached_file

    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        file = cached_file(pretrained, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        if file is None:
            continue
        try:
            config = json.loads(Path(file).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"pretrained: {file} is not JSON: {error}") from error
        for part in (config, config.get("text_config") or {}):
            named = part.get("eos_token_id")
            found += named if isinstance(named, list) else [] if named is None else [named]
    return found


def _tried(tokenizer: Tokenizer, messages: Sequence[Message], kwargs: dict[str, object]) -> str | None:
    try:
        return render(tokenizer, messages, **kwargs)
    except ConfigError:  # not every template takes every conversation
        return None


def _behind(text: str | None) -> str:
    """The text after the last mark."""
    return text.rpartition(MARK)[2] if text and MARK in text else ""


def controls(tokenizer: Tokenizer, text: str) -> list[str]:
    """The control tokens in a text, in order: the special ones, or, where it has none, others that were added to the vocabulary."""
    special, added = _patterns(tokenizer)
    return special.findall(text) or added.findall(text)


@lru_cache(maxsize=8)
def _patterns(tokenizer: Tokenizer) -> tuple[re.Pattern[str], re.Pattern[str]]:
    added = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
    special = {token for token, is_special in added.items() if is_special} | set(tokenizer.all_special_tokens)
    return any_of(special), any_of(added)


def any_of(strings: Iterable[str]) -> re.Pattern[str]:
    """The longest of the strings at a place; blank ones, as Gemma's tokens of several new lines, are none."""
    return re.compile("|".join(re.escape(s) for s in sorted(strings, key=len, reverse=True) if s.strip()) or r"(?!)")
