"""Prompts for language models."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from datamodules.text import TextData
from datamodules.text_answers import Truncation, template_of, truncated
from datamodules.text_files import Fields, InvalidRow
from datamodules.text_rows import prompt_fields
from lit_rl.errors import ConfigError
from lit_rl.replay.sources import TextSource
from lit_rl.types import Info

log = logging.getLogger(__name__)


class TextPrompts(TextData, TextSource):
    """Prompts that a language model answers: strings or lists of messages, with what rewards need to know beside them.

    Rows as verl writes them are understood: `data_source`, `prompt`, `ability`, `reward_model: {style, ground_truth}`, `extra_info`.

    Args:
        prompt_key: Field that holds the prompt.
        max_prompt_length: Tokens of a prompt, the chat template's among them.
        filter_overlong_prompts: Leave out longer prompts, and those that cannot be tokenized; how many is logged.
        truncation: What becomes of longer prompts otherwise: they stop the run before training (`error`), or keep their last tokens
            (`left`), their first (`right`), or half of both (`middle`).
        kwargs: See `TextData`.
    """

    def __init__(
        self,
        *,
        prompt_key: str = "prompt",
        max_prompt_length: int = 512,
        filter_overlong_prompts: bool = False,
        truncation: Truncation = "error",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if max_prompt_length < 1:
            raise ConfigError(f"data.max_prompt_length={max_prompt_length} must be at least 1")
        self.prompt_key = prompt_key
        self.max_prompt_length = max_prompt_length
        self.filter_overlong_prompts = filter_overlong_prompts
        self.truncation: Truncation = truncation
        self._ids: dict[int, list[int]] = {}
        self.read()

    def fields(self, row: Fields) -> Fields:
        """`prompt`, and what rewards need."""
        return prompt_fields(row, key=self.prompt_key, chat=self.chat)

    def ahead(self, rows: Sequence[Info]) -> None:
        """Tokenize many prompts at once. Where one of them is refused, all are tokenized one by one, which tells it."""
        self._ids = {}
        prompts = [info for info in rows if info.get("kind") != "pair"]
        encode_many = getattr(self.policy, "encode_many", None)
        if encode_many is None or not rows:
            return
        try:
            ids = encode_many([info["prompt"] for info in prompts], [template_of(info) for info in prompts])
        except Exception:  # templates are programs, as below
            log.debug("prompts are tokenized one by one", exc_info=True)
        else:
            self._ids = {id(info): own for info, own in zip(prompts, ids, strict=True)}

    def unusable(self, info: Info) -> str | None:
        """The reason why a prompt is left out: it is too long, or its template refuses it."""
        try:
            ids = self._ids.pop(id(info), None)
            ids = self.encoded(info) if ids is None else ids
        except Exception as error:  # templates are programs: they refuse roles and orders of turns in their own ways
            if self.filter_overlong_prompts:
                return "cannot be tokenized"
            raise InvalidRow(
                f"{self.prompt_key}: cannot be tokenized ({error}); data.filter_overlong_prompts: true leaves it out"
            ) from error
        ids = self.with_pictures(ids, info)
        if self.filter_overlong_prompts and len(ids) > self.max_prompt_length:
            return f"longer than data.max_prompt_length={self.max_prompt_length} tokens"
        self.note("prompt", len(self._cut(ids, info)))
        return None

    def prompt_ids(self, info: Info) -> list[int]:
        """Token ids of a prompt, cut to `max_prompt_length`."""
        return self._cut(super().prompt_ids(info), info)

    def _cut(self, ids: list[int], info: Info) -> list[int]:
        if len(ids) > self.max_prompt_length and "images" in info:
            raise InvalidRow(
                f"{self.prompt_key}: has {len(ids)} tokens with its images, more than data.max_prompt_length={self.max_prompt_length}, and "
                "images cannot be cut: raise it, set model.policy.max_pixels to less, or data.filter_overlong_prompts to true"
            )
        try:
            return truncated(ids, limit=self.max_prompt_length, how=self.truncation)
        except InvalidRow as error:
            raise InvalidRow(f"{self.prompt_key}: {error}, or data.filter_overlong_prompts to true") from None
