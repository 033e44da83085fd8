"""The spans of the assistant's turns in a rendered conversation.

A template is a program, so the places are found by what changes in its text when a message does. A turn begins where the generation prompt
ends and goes to the token that ends it: what a policy would have to say there.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from lit_rl.errors import ConfigError
from lit_rl.policies.base import Message
from lit_rl.policies.chat_template import MARK, REASONING, Ends, accepted, any_of, controls, render, turn_ends, without_ends
from lit_rl.policies.tokenizer import Tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Turn:
    """Characters of one assistant turn: from `start`, the end token from `end` to `stop`; `end` is `stop` where there is none."""

    message: int
    start: int
    end: int
    stop: int


@dataclass
class Conversation:
    """A conversation as the template writes it.

    messages: In the spelling that the template takes. stops: Further strings that end answers. prefill: (number of a message, characters
    of its content that the prompt already holds).
    """

    tokenizer: Tokenizer
    given: Sequence[Message]
    template: dict[str, object]
    stops: Collection[str] = ()
    prefill: tuple[int, int] = (-1, 0)
    messages: list[Message] = field(init=False)
    text: str = field(init=False)

    def __post_init__(self) -> None:
        given = without_ends(self.tokenizer, self.given, stops=self.stops, template=self.template)
        self.messages, self.text = accepted(self.tokenizer, given, **self.template)
        self.ends: Ends = turn_ends(self.tokenizer, **self.template)
        self.ending = any_of([*self.ends.all, *self.stops])
        self._places: dict[int, tuple[int, int] | None] = {}

    # ------------------------------------------------------------------ turns
    def turn(self, i: int) -> Turn | None:
        """The span of message `i` of the assistant; None where the template leaves it out."""
        place = self.place(i)
        if place is None:
            return None
        begin, close = place
        if beside := self.left_out(i):
            warn_of_what_is_left_out(beside)
        start = begin if self.prefill[0] == i else self.start(i, begin, close)
        end, stop = self.stop(i, close)
        return Turn(i, start, end, stop)

    def place(self, i: int) -> tuple[int, int] | None:
        """Characters from the first to the last that depend on what message `i` says; None where none does."""
        if i not in self._places:
            found = [place for message in self._altered(i) if (place := self._difference(i, message)) is not None]
            self._places[i] = (min(a for a, _ in found), max(b for _, b in found)) if found else None
        return self._places[i]

    def _altered(self, i: int) -> list[Message]:
        """The message with another content and other thoughts, and with another last call."""
        message = self.messages[i]
        kept = self.prefill[1] if self.prefill[0] == i else 0
        changed = {name: MARK for name in REASONING if message.get(name)}
        if isinstance(content := message.get("content"), str):
            changed["content"] = content[:kept] + MARK
        others: list[Message] = [{**message, **changed}] if changed else []
        if isinstance(calls := message.get("tool_calls"), list | tuple) and calls:
            function = {**calls[-1].get("function", {}), "arguments": {MARK: MARK}}
            others.append({**message, "tool_calls": [*calls[:-1], {**calls[-1], "function": function}]})
        return others

    def left_out(self, i: int) -> tuple[str, ...]:
        """Texts of a message with calls of tools that the template does not write beside them, as Llama 3's and Mistral's."""
        message = self.messages[i]
        texts = [name for name in ("content", *REASONING) if isinstance(text := message.get(name), str) and text.strip()]
        return tuple(name for name in texts if message.get("tool_calls") and self._difference(i, {**message, name: MARK}) is None)

    def _difference(self, i: int, message: Message) -> tuple[int, int] | None:
        other = render(self.tokenizer, [*self.messages[:i], message, *self.messages[i + 1 :]], **self.template)
        if other == self.text:
            return None
        begin = common(self.text, other)
        rest = min(len(self.text), len(other)) - begin
        return begin, len(self.text) - min(rest, common(self.text[::-1], other[::-1]))

    def start(self, i: int, begin: int, close: int) -> int:
        """Behind the generation prompt: of the messages before, or, where the template writes these differently, what it appends."""
        if i:
            try:
                before = render(self.tokenizer, self.messages[:i], add_generation_prompt=True, **self.template)
            except ConfigError:  # the assistant may not be asked there, e.g. after its own turn
                before = ""
            if before and self.text.startswith(before) and len(before) <= close:
                return len(before)
        previous = self.place(i - 1) if i else None
        lower = previous[1] if previous else 0
        for opening in openings(self.tokenizer, self.ends.opening):
            if (at := self.text.rfind(opening, lower, begin)) >= 0:
                if i + 1 == len(self.messages) and opening != self.ends.opening:
                    warn_of_opening(self.ends.opening, opening)
                return at + len(opening)
        return self._header(i, begin)

    def _header(self, i: int, begin: int) -> int:
        """The start of an answer where a template knows no generation prompt: after the text that it writes before a turn is added."""
        before = render(self.tokenizer, self.messages[:i], **self.template) if i else ""
        return len(before) if before and self.text.startswith(before) and len(before) <= begin else begin

    def stop(self, i: int, close: int) -> tuple[int, int]:
        """The span of the token that ends the turn."""
        if (found := self.ending.search(self.text, close)) and not self.text[close : found.start()].strip():
            return found.span()
        following = self.place(i + 1) if i + 1 < len(self.messages) else None
        limit = following[0] if following else len(self.text)
        if found := self.ending.search(self.text, close, limit):
            return found.span()
        rest = self.text[close:limit]
        if i + 1 == len(self.messages):
            if tokens := controls(self.tokenizer, rest):
                at = close + rest.index(tokens[0])
                return at, at + len(tokens[0])
            return close + len(rest.rstrip()), close + len(rest.rstrip())
        end = close + len(self.ends.text) if rest.startswith(self.ends.text) else close
        return end, end


@lru_cache(maxsize=8)
def openings(tokenizer: Tokenizer, opening: str) -> list[str]:
    """A generation prompt and its beginnings by whole lines and control tokens, the longest first: where it begins the assistant's
    thoughts, an answer without thoughts has only the first part."""
    edges = {len(opening)} | {i + 1 for i, c in enumerate(opening) if c == "\n"}
    at = 0
    for token in controls(tokenizer, opening):
        at = opening.index(token, at) + len(token)
        edges |= {at - len(token), at}
    return [opening[:n] for n in sorted(edges - {0}, reverse=True)]


@lru_cache(maxsize=8)
def warn_of_opening(begun: str, written: str) -> None:
    """Once for each template."""
    log.warning(
        "the chat template asks for an answer by %r but writes one behind %r: what is learned is not what will be asked for; "
        "set model.policy.chat_template to one that writes both alike",
        begun,
        written,
    )


@lru_cache(maxsize=8)
def warn_of_what_is_left_out(fields: tuple[str, ...]) -> None:
    """Once for each kind."""
    log.warning(
        "the chat template leaves out %s of messages that have tool_calls: it is not learned, only the calls are; set "
        "model.policy.chat_template to one that writes both, or put the text into a message of its own",
        " and ".join(fields),
    )


def common(a: str, b: str) -> int:
    """Characters that two texts begin with alike."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
