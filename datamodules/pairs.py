"""Preferences between two answers."""

from __future__ import annotations

from typing import Any, Literal

from datamodules.text import TextData
from datamodules.text_answers import answer_ids, truncated
from datamodules.text_files import Fields, InvalidRow
from datamodules.text_rows import pair_fields
from lit_rl.errors import ConfigError
from lit_rl.policies.causal_lm import CausalLM
from lit_rl.policies.chat import AnswerIds
from lit_rl.replay.sources import PairSource
from lit_rl.types import Info

PairTruncation = Literal["error", "left", "right"]


class PreferencePairs(TextData, PairSource):
    """Rows of a prompt and two answers, of which one was preferred: strings, or lists of messages.

    Without a prompt, two conversations must begin alike: what they share is the prompt. `chosen` and `rejected` may repeat the prompt.

    Args:
        prompt_key: Field that holds the prompt.
        chosen_key: Field that holds the answer that was preferred.
        rejected_key: Field that holds the other answer.
        max_length: Tokens of prompt and answer together.
        truncation: What becomes of longer rows: they stop the run before training (`error`), lose the end of their answers (`right`), or
            the beginning of the prompt and, where one answer alone is longer, its end (`left`). Rows left without an answer are dropped
            and counted.
        kwargs: See `TextData`.
    """

    def __init__(
        self,
        *,
        prompt_key: str = "prompt",
        chosen_key: str = "chosen",
        rejected_key: str = "rejected",
        max_length: int = 4096,
        truncation: PairTruncation = "right",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if max_length < 2:
            raise ConfigError(f"data.max_length={max_length} must be at least 2: a token of the prompt and one of the answer")
        self.keys = {"prompt_key": prompt_key, "chosen_key": chosen_key, "rejected_key": rejected_key}
        self.max_length = max_length
        self.truncation: PairTruncation = truncation
        self.read()

    def fields(self, row: Fields) -> Fields:
        """`prompt`, `chosen` and `rejected`."""
        return pair_fields(row, **self.keys, chat=self.chat)

    def unusable(self, info: Info) -> str | None:
        """The reason why a pair is left out: no learned token within `max_length`."""
        prompt, chosen, rejected = self.pair_ids(info)
        self.note("sequence", len(prompt) + max(len(chosen), len(rejected)))
        return None if any(chosen.learned) and any(rejected.learned) else f"no answer within data.max_length={self.max_length} tokens"

    def pair_ids(self, info: Info) -> tuple[list[int], AnswerIds, AnswerIds]:
        """Token ids of the prompt, of the answer that was preferred and of the other one, each answer with its end."""
        return pair_ids(self.policy, info, limit=self.max_length, how=self.truncation)


def pair_ids(
    policy: CausalLM, info: Info, *, limit: int, how: PairTruncation, keys: tuple[str, str] = ("max_length", "truncation")
) -> tuple[list[int], AnswerIds, AnswerIds]:
    """Ids of the prompt and of two answers, at most `limit` together with either. Where the answers begin is the same for both."""
    prompt_ids, chosen = answer_ids(policy, info, info["chosen"])
    other, rejected = answer_ids(policy, info, info["rejected"])
    start = min(len(prompt_ids), len(other))
    border = prompt_ids[:start] == other[:start]  # otherwise the two go on with different words of somebody else's
    if not border:
        start = next(i for i, (a, b) in enumerate(zip(prompt_ids, other)) if a != b)
    if not start:  # only where the prompt's first token reaches into an answer
        raise InvalidRow("prompt: its first token changes with the answer, so the two share no beginning: set data.chat to true")
    chosen, rejected = _longer(prompt_ids[start:], border, chosen), _longer(other[start:], border, rejected)
    prompt, longest = prompt_ids[:start], max(len(chosen), len(rejected))
    if how == "error":
        truncated([*prompt, *range(longest)], limit=limit, how="error", keys=keys)
    if "images" in info and limit < len(prompt) + (longest if how == "left" else 1):
        raise InvalidRow(f"prompt: has {len(prompt)} tokens with its images, which data.{keys[0]}={limit} cuts: raise it")
    if how == "left":
        prompt = prompt[-max(1, limit - longest) :]
    room = max(0, limit - len(prompt))
    return prompt, chosen[:room], rejected[:room]


def _longer(ids: list[int], learned: bool, answer: AnswerIds) -> AnswerIds:
    """The answer with these ids before it."""
    return AnswerIds([*ids, *answer], [learned] * len(ids) + answer.learned)
