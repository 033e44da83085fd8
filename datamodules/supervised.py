"""Answers to imitate."""

from __future__ import annotations

from typing import Any

from datamodules.text import TextData
from datamodules.text_answers import answer_ids, template_of
from datamodules.text_files import Fields, InvalidRow
from datamodules.text_images import learned_picture, sizes_of
from datamodules.text_rows import supervised_fields
from lit_rl.errors import ConfigError
from lit_rl.policies.chat import conversation_ids
from lit_rl.replay.sources import SupervisedSource
from lit_rl.types import Info


class SupervisedText(TextData, SupervisedSource):
    """Conversations (`messages`), or prompts with answers (`prompt` and `response`, `question` and `answer`).

    Each row is looked at for these fields in this order. The tokens that the assistant wrote are supervised, those that end its turns
    included; `prompt` and `response` of a conversation are its last answer and what came before it.

    Args:
        messages_key: Field that holds a conversation.
        prompt_key: Field that holds a prompt; with `response_key`, or none of both to look for them as said above.
        response_key: Field that holds the answer to it.
        max_length: Tokens of a row; longer ones lose their end. Rows left without a supervised token are dropped and counted.
        kwargs: See `TextData`.
    """

    def __init__(
        self,
        *,
        messages_key: str = "messages",
        prompt_key: str | None = None,
        response_key: str | None = None,
        max_length: int = 4096,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if (prompt_key is None) != (response_key is None):
            raise ConfigError("data.prompt_key and data.response_key go together: name both, e.g. question and answer, or none")
        if max_length < 2:
            raise ConfigError(f"data.max_length={max_length} must be at least 2")
        self.messages_key = messages_key
        self.keys = (prompt_key, response_key) if prompt_key and response_key else None
        self.max_length = max_length
        self.read()

    def fields(self, row: Fields) -> Fields:
        """`messages`, `prompt` and `response`."""
        return supervised_fields(row, messages_key=self.messages_key, keys=self.keys, chat=self.chat)

    def unusable(self, info: Info) -> str | None:
        """The reason why a row is left out: no supervised token within `max_length`."""
        if (turn := learned_picture(info.get("messages", ()))) is not None:
            raise InvalidRow(
                f"messages[{turn}]: an answer with an image cannot be learned: take the image out, or give the turn `weight: 0`"
            )
        ids, mask = self._whole(info)
        if "images" in info and set(ids[self.max_length :]) & set(self.policy.banned_ids):
            return f"its images end behind data.max_length={self.max_length}"
        self.note("sequence", min(len(mask), self.max_length))
        if any(mask[: self.max_length]):
            return None
        return f"no supervised token within data.max_length={self.max_length}" if any(mask) else "no message of the assistant is learned"

    def supervised_ids(self, info: Info) -> tuple[list[int], list[bool]]:
        """Token ids, and which of them are supervised."""
        ids, mask = self._whole(info)
        return ids[: self.max_length], mask[: self.max_length]

    def _whole(self, info: Info) -> tuple[list[int], list[bool]]:
        policy = self.policy
        if "messages" in info:
            template = {**policy.chat_template_kwargs, **template_of(info)}
            found = conversation_ids(policy.tokenizer, info["messages"], first=0, prefill=0, stop_ids=policy.stop_ids, **template)
            return policy.with_pictures(*found, sizes_of(info))
        prompt, answer = answer_ids(policy, info, info.get("completion", info["response"]))
        return prompt + answer, [False] * len(prompt) + answer.learned
