"""What the fields of a row of text mean, and what is said when they mean nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from datamodules.text_files import Fields, InvalidRow
from lit_rl.policies.base import Message
from lit_rl.policies.chat import SWITCHES
from lit_rl.policies.chat_template import REASONING

Text = str | list[Message]
"""A string, or a conversation."""

EXAMPLE = '[{"role": "user", "content": "..."}]'
UNREAD = ("train_detail", "training_detail")
"""Fields by which axolotl learns parts of a message."""
PAIRS_OF_KEYS = (("prompt", "response"), ("question", "answer"))


def text_field(row: Mapping[str, Any], key: str, *, empty: bool = False) -> Text:
    """A string or a list of messages, which may be written as JSON; `empty`: the string may be."""
    if key not in row:
        raise InvalidRow(f"{key}: missing or null; the row has {sorted(row)}")
    value = row[key]
    if isinstance(value, str):
        if (found := _json(value)) is not None and isinstance(found, list) and found and all(isinstance(m, dict) for m in found):
            return messages(found, key) if all("role" in m for m in found) else value
        if not empty and not value.strip():
            raise InvalidRow(f"{key}: is empty; expected a text or a list of messages {EXAMPLE}")
        return value
    return messages(value, key)


def _json(text: str) -> Any:
    """What a text says that is a JSON list or object; None for any other."""
    if not text.lstrip().startswith(("[", "{")):
        return None
    try:
        return json.loads(text)
    except ValueError:  # a text that begins with a bracket
        return None


def messages(value: Any, key: str) -> list[Message]:
    """A conversation, without the fields of its messages that are null."""
    value = found if isinstance(value, str) and isinstance(found := _json(value), list) else value
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else type(value).__name__
        raise InvalidRow(f"{key}: expected a text or a list of messages {EXAMPLE}, found {found}")
    return [_message(message, f"{key}[{i}]") for i, message in enumerate(value)]


def _message(message: Any, key: str) -> Message:
    if not isinstance(message, dict):
        raise InvalidRow(f'{key}: expected a message {{"role": ..., "content": ...}}, found {type(message).__name__}')
    result = {name: part for name, part in message.items() if part is not None and part != []}
    if not isinstance(result.get("role"), str):
        raise InvalidRow(f"{key}.role: expected a string, found {type(message.get('role')).__name__}")
    if "tool_calls" in result:
        result["tool_calls"] = _calls(result["tool_calls"], f"{key}.tool_calls")
    if isinstance(result.get("content"), list):
        result["content"] = _parts(result["content"], f"{key}.content")
    silent = result["role"] == "assistant" and ("tool_calls" in result or any(result.get(name) for name in REASONING))
    if not isinstance(result.get("content", "" if silent else None), str):
        raise InvalidRow(f"{key}.content: expected a string, found {type(message.get('content')).__name__}")
    for name in SWITCHES:
        if name in result:
            result[name] = _switch(result[name], f"{key}.{name}")
    for name in UNREAD:
        if name in result:
            raise InvalidRow(f"{key}.{name}: parts of a message cannot be chosen: take it out, or choose whole messages by weight: 0 or 1")
    return {name: part for name, part in result.items() if part is not None}


def _switch(value: Any, key: str) -> bool | None:
    """Whether a message is learned; NaN, which tables have for what is missing, says nothing."""
    if isinstance(value, float) and math.isnan(value):
        return None
    if not isinstance(value, bool | int | float) or value not in (0, 1):
        raise InvalidRow(f"{key}: expected 0 or 1, true or false, found {value!r}: a message is learned or it is not")
    return bool(value)


def _parts(parts: Sequence[Any], key: str) -> str:
    """A content in parts as one text."""
    texts: list[str] = []
    for i, part in enumerate(parts):
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            raise InvalidRow(f'{key}[{i}]: expected {{"type": "text", "text": ...}}, found {part!r}: a language model reads texts only')
        texts.append(text)
    return "".join(texts)


def _calls(value: Any, key: str) -> list[Any]:
    """Calls of tools, the arguments as objects: a template writes them as it likes."""
    value = _json(value) if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(call, dict) for call in value):
        raise InvalidRow(f'{key}: expected a list such as [{{"type": "function", "function": {{"name": ..., "arguments": {{...}}}}}}]')
    calls = []
    for i, call in enumerate(value):
        call = call if isinstance(call.get("function"), dict) or "name" not in call else {"type": "function", "function": call}
        function = call.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InvalidRow(f"{key}[{i}].function: expected an object with name and arguments, found {function!r}")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = _json(arguments) if arguments.strip() else {}
        if not isinstance(arguments, dict | None):
            arguments = None
        if arguments is None and function.get("arguments") is not None:
            raise InvalidRow(f"{key}[{i}].function.arguments: expected an object, as it is or as JSON, found {function['arguments']!r}")
        calls.append({**call, "function": {**function, "arguments": {} if arguments is None else arguments}})
    return calls


def tools_of(row: Fields) -> Fields:
    """`tools` as a list of objects, and no such field where there are none. They may be written as JSON, all or each."""
    value = row.get("tools")
    if isinstance(value, str):
        value = _json(value) if value.strip() else []
    if value is None and not row.get("tools"):
        return row
    if not isinstance(value, list):
        raise InvalidRow(f"tools: expected a list of tools, as it is or as JSON, found {row['tools']!r}")
    tools = [_json(tool) if isinstance(tool, str) else tool for tool in value]
    if not all(isinstance(tool, dict) for tool in tools):
        raise InvalidRow('tools: expected objects such as {"type": "function", "function": {"name": ..., "parameters": {...}}}')
    rest = {name: part for name, part in row.items() if name != "tools"}
    return rest | {"tools": tools} if tools else rest


def as_turn(text: Text, role: str) -> list[Message]:
    """A string as the one message of a conversation."""
    return [{"role": role, "content": text}] if isinstance(text, str) else text


def check_reward_fields(row: Mapping[str, Any]) -> None:
    """reward_model and extra_info are objects where they are given."""
    for key, example in (("reward_model", '{"style": "rule", "ground_truth": "42"}'), ("extra_info", '{"index": 0}')):
        if not isinstance(row.get(key, {}), dict):
            raise InvalidRow(f"{key}: expected an object such as {example}, found {type(row[key]).__name__}")


# ---------------------------------------------------------------------- prompts


def prompt_fields(row: Fields, *, key: str, chat: bool) -> Fields:
    """`prompt` under this name. chat: a string is what a user says."""
    check_reward_fields(row)
    row, prompt = tools_of(row), text_field(row, key)
    return row | {"prompt": as_turn(prompt, "user") if chat else prompt}


# ---------------------------------------------------------------------- examples to imitate


def supervised_fields(row: Fields, *, messages_key: str, keys: tuple[str, str] | None, chat: bool) -> Fields:
    """`prompt` and `response`, and `messages` where the row is a conversation: its last answer is then the response.

    A response of several messages, or of one that says more than its content, is `completion` too.

    keys: Names of prompt and response; None: prompt and response, or question and answer, in this order, after `messages_key`.
    """
    row = tools_of(row)
    if keys is None and messages_key in row:
        conversation = messages(row[messages_key], messages_key)
        answered = [i for i, message in enumerate(conversation) if message["role"] == "assistant"]
        if not answered or answered[-1] == 0:
            raise InvalidRow(f"{messages_key}: expected a user's message and an answer by role assistant, found {_roles(conversation)}")
        last = answered[-1]
        response = conversation[last].get("content", "")
        while conversation[last - 1]["role"] == "assistant" and last > 1:  # a prompt that ended there would be continued
            last -= 1
        return row | {"messages": conversation, "prompt": conversation[:last], "response": response}
    pair = keys or next((pair for pair in PAIRS_OF_KEYS if all(key in row for key in pair)), None)
    if pair is None:
        known = ", or ".join([messages_key, *(" and ".join(pair) for pair in PAIRS_OF_KEYS)])
        raise InvalidRow(f"expected {known} (or name data.prompt_key and data.response_key), found {sorted(row)}")
    prompt, response = text_field(row, pair[0]), text_field(row, pair[1])
    rest = {name: value for name, value in row.items() if name not in ("messages", "completion")}
    if not isinstance(response, str):
        if response[0]["role"] != "assistant":
            raise InvalidRow(f"{pair[1]}: expected a text or one message by role assistant, and what follows it, found {_roles(response)}")
        prompt = as_turn(prompt, "user")
        if len(response) > 1 or set(response[0]) > {"role", "content"}:
            rest["completion"] = response
        response = response[-1].get("content", "") if response[-1]["role"] == "assistant" else ""
    return rest | {"prompt": as_turn(prompt, "user") if chat else prompt, "response": response}


# ---------------------------------------------------------------------- preferences


def pair_fields(row: Fields, *, prompt_key: str, chosen_key: str, rejected_key: str, chat: bool) -> Fields:
    """`prompt`, `chosen` and `rejected`: three strings, or three lists of messages if any of them is one.

    Without a prompt it is what the two conversations begin with alike.
    """
    row = tools_of(row)
    chosen, rejected = (text_field(row, key, empty=True) for key in (chosen_key, rejected_key))
    if prompt_key in row:
        prompt = text_field(row, prompt_key)
        if chat or any(isinstance(part, list) for part in (prompt, chosen, rejected)):
            prompt = as_turn(prompt, "user")
            chosen, rejected = (_completion(prompt, part, key) for part, key in ((chosen, chosen_key), (rejected, rejected_key)))
        return row | {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise InvalidRow(
            f"{prompt_key}: missing or null; only when {chosen_key} and {rejected_key} are lists of messages may it be left out"
        )
    shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b), min(len(chosen), len(rejected)))
    if not 0 < shared < min(len(chosen), len(rejected)):
        what = "begin differently" if not shared else "do not differ" if chosen == rejected else "are not two answers to the same messages"
        raise InvalidRow(f"{chosen_key} and {rejected_key} {what}: expected the same messages and then different answers")
    return row | {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


def _begun(prompt: list[Message], turns: list[Message]) -> list[Message]:
    """The rest of a whole conversation whose prompt ends within a message of the assistant's; empty where it does not."""
    last, rest = len(prompt) - 1, turns[len(prompt) - 1 :]
    begun = prompt[-1].get("content", "")
    if prompt[-1]["role"] != "assistant" or turns[:last] != prompt[:last] or not rest or rest[0]["role"] != "assistant" or not last:
        return []
    whole = rest[0].get("content", "")
    return [{**rest[0], "content": whole[len(begun) :]}, *rest[1:]] if whole.startswith(begun) else []


def _completion(prompt: list[Message], answer: Text, key: str) -> list[Message]:
    """The messages that follow the prompt, which a whole conversation may repeat."""
    turns = as_turn(answer, "assistant")
    if turns[: len(prompt)] == prompt:
        turns = turns[len(prompt) :]
    elif begun := _begun(prompt, turns):
        turns = begun
    if not turns or turns[0]["role"] != "assistant":
        raise InvalidRow(f"{key}: expected an answer by role assistant after the prompt, found {_roles(turns)}")
    return turns


# ---------------------------------------------------------------------- both kinds in one file

Kind = Literal["pair", "self_play"]


def row_kind(row: Mapping[str, Any]) -> Kind:
    """`pair` where `chosen` and `rejected` are given, otherwise `self_play`: the answers to its prompt are sampled.

    Raises InvalidRow where only one of the two is given, or `self_play: false` and neither.
    """
    given = [key for key in ("chosen", "rejected") if row.get(key) is not None]
    if len(given) == 2:
        return "pair"
    if given:
        missing = ({"chosen", "rejected"} - set(given)).pop()
        raise InvalidRow(f"{missing}: missing or null beside {given[0]}; a preference needs both, a self-play row neither")
    self_play = row.get("self_play")
    if self_play is not None and not isinstance(self_play, bool):
        raise InvalidRow(f"self_play: expected true or false, found {self_play!r}")
    if self_play is False:
        raise InvalidRow("self_play: is false, so the row needs chosen and rejected; leave it out, or set it to true, to sample answers")
    return "self_play"


def _roles(conversation: Sequence[Message]) -> str:
    return f"roles {[message['role'] for message in conversation]}"
