"""Texts and conversations as the fields of a row hold them: checked, and brought into one form."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

from datamodules.text_files import Fields, InvalidRow
from lit_rl.policies.base import Message
from lit_rl.policies.chat import SWITCHES
from lit_rl.policies.chat_template import REASONING

Text = str | list[Message]
"""A string, or a conversation."""


EXAMPLE = '[{"role": "user", "content": "..."}]'


UNREAD = ("train_detail", "training_detail")
"""Fields by which axolotl learns parts of a message."""


def text_field(row: Mapping[str, object], key: str, *, empty: bool = False) -> Text:
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


def _json(text: str) -> object:
    """The value of a text that is a JSON list or object; None for any other."""
    if not text.lstrip().startswith(("[", "{")):
        return None
    try:
        return json.loads(text)
    except ValueError:  # a text that begins with a bracket
        return None


def messages(value: object, key: str) -> list[Message]:
    """A conversation, without the fields of its messages that are null."""
    value = found if isinstance(value, str) and isinstance(found := _json(value), list) else value
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else type(value).__name__
        raise InvalidRow(f"{key}: expected a text or a list of messages {EXAMPLE}, found {found}")
    return [_message(message, f"{key}[{i}]") for i, message in enumerate(value)]


def _message(message: object, key: str) -> Message:
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
    if not isinstance(result.get("content", "" if silent else None), str | list):
        raise InvalidRow(f"{key}.content: expected a string, found {type(message.get('content')).__name__}")
    for name in SWITCHES:
        if name in result:
            result[name] = _switch(result[name], f"{key}.{name}")
    for name in UNREAD:
        if name in result:
            raise InvalidRow(f"{key}.{name}: parts of a message cannot be chosen: take it out, or choose whole messages by weight: 0 or 1")
    return {name: part for name, part in result.items() if part is not None}


def _switch(value: object, key: str) -> bool | None:
    """True or False as a message is learned or not; None for NaN, which tables have for missing values."""
    if isinstance(value, float) and math.isnan(value):
        return None
    if not isinstance(value, bool | int | float) or value not in (0, 1):
        raise InvalidRow(f"{key}: expected 0 or 1, true or false, found {value!r}: a message is learned or it is not")
    return bool(value)


def _parts(parts: Sequence[object], key: str) -> str | list[Message]:
    """A content in parts as one text; where there are images among them, as parts {"type": "text" | "image", ...}."""
    found = [_part(part, f"{key}[{i}]") for i, part in enumerate(parts)]
    return found if any(part["type"] == "image" for part in found) else "".join(str(part["text"]) for part in found)


def _part(part: object, key: str) -> Message:
    if isinstance(part, dict):
        known = {name: value for name, value in part.items() if value is not None}
        image = known.get("image", known.get("image_url"))
        if image is not None or known.get("type") in ("image", "image_url"):
            return {"type": "image"} | ({} if image is None else {"image": image})
    text = part.get("text") if isinstance(part, dict) else part
    if not isinstance(text, str):
        raise InvalidRow(f'{key}: expected {{"type": "text", "text": ...}} or {{"type": "image"}}, found {part!r}')
    return {"type": "text", "text": text}


def _calls(value: object, key: str) -> list[dict[str, object]]:
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


def _roles(conversation: Sequence[Message]) -> str:
    return f"roles {[message['role'] for message in conversation]}"
