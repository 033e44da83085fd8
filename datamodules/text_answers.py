"""Token ids of a row's prompt and answers, with the images that stand in them."""

from __future__ import annotations

from typing import Literal

from datamodules.text_files import InvalidRow
from datamodules.text_images import sizes_of
from datamodules.text_messages import Text, as_turn
from lit_rl.policies.causal_lm import CausalLM
from lit_rl.policies.chat import AnswerIds, completion_ids
from lit_rl.policies.chat import answer_ids as turns_ids
from lit_rl.types import Info

Truncation = Literal["error", "left", "right", "middle"]


def template_of(info: Info) -> dict[str, object]:
    """Arguments of the chat template that a row holds beside its messages."""
    return {"tools": info["tools"]} if "tools" in info and not isinstance(info["prompt"], str) else {}


def truncated(ids: list[int], *, limit: int, how: Truncation, keys: tuple[str, str] = ("max_prompt_length", "truncation")) -> list[int]:
    """At most `limit` ids: the last, the first, or the first limit // 2 and the last of them. `error` raises InvalidRow."""
    if len(ids) <= limit:
        return ids
    if how == "error":
        raise InvalidRow(f"has {len(ids)} tokens, more than data.{keys[0]}={limit}: raise it, or set data.{keys[1]} to left or right")
    half = limit // 2
    return {"left": ids[-limit:], "right": ids[:limit], "middle": [*ids[:half], *ids[len(ids) - (limit - half) :]]}[how]


def answer_ids(policy: CausalLM, info: Info, answer: Text) -> tuple[list[int], AnswerIds]:
    """Token ids of a row's prompt and of an answer to it, with the token that ends it.

    Both are tokenized together, and the answer starts where that differs from the prompt alone: tokens may reach over the border. The
    first token is the prompt's in any case, for nothing predicts it.
    """
    prompt = info["prompt"]
    if isinstance(prompt, str) and isinstance(answer, str):
        ids, mask = policy.with_pictures(*completion_ids(policy.tokenizer, prompt, answer), ())
        start = max(1, mask.index(True))
        return ids[:start], AnswerIds(ids[start:], mask[start:])
    template = {**policy.chat_template_kwargs, **template_of({**info, "prompt": []})}
    turns, answers = as_turn(prompt, "user"), as_turn(answer, "assistant")
    ids, found = turns_ids(policy.tokenizer, turns, answers, stop_ids=policy.stop_ids, **template)
    whole, learned = policy.with_pictures([*ids, *found], [*[False] * len(ids), *found.learned], sizes_of(info))
    start = len(whole) - len(found)
    return whole[:start], AnswerIds(whole[start:], learned[start:])
