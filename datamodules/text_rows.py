"""Rows of text under the field names that methods and rewards know; a sentence for each that has no meaning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from datamodules.text_files import Fields, InvalidRow
from datamodules.text_messages import Text, _roles, as_turn, messages, text_field, tools_of
from lit_rl.policies.base import Message

PAIRS_OF_KEYS = (("prompt", "response"), ("question", "answer"))


def check_reward_fields(row: Mapping[str, object]) -> None:
    """reward_model and extra_info are objects where they are given."""
    for key, example in (("reward_model", '{"style": "rule", "ground_truth": "42"}'), ("extra_info", '{"index": 0}')):
        if key in row and not isinstance(row[key], dict):
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
    if not (isinstance(whole, str) and isinstance(begun, str) and whole.startswith(begun)):
        return []
    return [{**rest[0], "content": whole[len(begun) :]}, *rest[1:]]


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


def row_kind(row: Mapping[str, object]) -> Kind:
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
