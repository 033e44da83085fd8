"""Prompts to answer and preferences to learn from, in one file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from datamodules.base import Batches
from datamodules.pairs import PairTruncation, pair_ids
from datamodules.prompts_text import TextPrompts
from datamodules.text_files import Fields, Rows
from datamodules.text_rows import pair_fields, row_kind
from lit_rl.errors import ConfigError
from lit_rl.policies.chat import AnswerIds
from lit_rl.replay.sources import PairSource
from lit_rl.types import Info


class PromptsAndPairs(TextPrompts, PairSource):
    """Rows `{prompt}`, `{prompt, self_play: true}` and `{prompt, chosen, rejected}`; `info["kind"]` is `self_play` or `pair`.

    Held-out pairs are `held_out_pairs`, the other held-out rows those that are answered and scored. Batches of either kind are evaluated.

    Args:
        max_length: Tokens of the prompt and either answer of a pair; the other length limits are those of self-play rows.
        pair_truncation: What becomes of longer pairs, see `PreferencePairs`.
        kwargs: See `TextPrompts`.
    """

    def __init__(self, *, max_length: int = 4096, pair_truncation: PairTruncation = "right", **kwargs: Any) -> None:
        if max_length < 2:
            raise ConfigError(f"data.max_length={max_length} must be at least 2: a token of the prompt and one of the answer")
        self.max_length = max_length
        self.pair_truncation: PairTruncation = pair_truncation
        self.held_out_pairs: Rows | tuple[()] = ()
        super().__init__(**kwargs)

    def fields(self, row: Fields) -> Fields:
        """The fields of a prompt or of a pair, with its `kind`."""
        kind = row_kind(row)
        if kind == "self_play":
            return super().fields(row) | {"kind": kind}
        pair = pair_fields(row, prompt_key=self.prompt_key, chosen_key="chosen", rejected_key="rejected", chat=self.chat)
        return pair | {"kind": kind}

    def unusable(self, info: Info) -> str | None:
        """The reason why a row is left out, by its kind."""
        if info["kind"] == "self_play":
            return super().unusable(info)
        prompt, chosen, rejected = self.pair_ids(info)
        self.note("sequence", len(prompt) + max(len(chosen), len(rejected)))
        return None if any(chosen.learned) and any(rejected.learned) else f"no answer within data.max_length={self.max_length} tokens"

    def pair_ids(self, info: Info) -> tuple[list[int], AnswerIds, AnswerIds]:
        """Token ids of the prompt, of the answer that was preferred and of the other one, each answer with its end."""
        return pair_ids(self.policy, info, limit=self.max_length, how=self.pair_truncation, keys=("max_length", "pair_truncation"))

    def use(self, split: str, rows: Rows) -> None:
        """Take the checked rows; held-out pairs apart from held-out prompts."""
        if split == "val":
            pairs = [info["kind"] == "pair" for info in rows]
            self.held_out_pairs = rows.select([i for i, pair in enumerate(pairs) if pair])
            rows = rows.select([i for i, pair in enumerate(pairs) if not pair])
        super().use(split, rows)

    def val_dataloader(self) -> Batches:
        """Batches of one kind each, spread evenly: the first (`trainer.limit_val_batches`) are of both. Alike on all processes."""
        kinds = [self._batches(rows).batches for rows in (self.held_out, self.held_out_pairs)]
        placed = [((i + 0.5) / len(batches), batch) for batches in kinds for i, batch in enumerate(batches)]
        return Batches([batch for _, batch in sorted(placed, key=lambda one: one[0])])

    test_dataloader = val_dataloader

    def rows_to_score(self, stage: str) -> Iterator[Info]:
        """The prompts; pairs are not scored."""
        return (info for info in super().rows_to_score(stage) if info["kind"] == "self_play")
