"""Judges that compare: every pair of a group, and win rates as scores."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from torch import Tensor

from lit_rl.errors import ConfigError
from lit_rl.rewards.judges.client import Judge
from lit_rl.rewards.judges.messages import Part, harmless, question
from lit_rl.rewards.judges.pairs import (
    LABELS,
    WANTED,
    Vote,
    bias,
    blended,
    category_rates,
    contradictions,
    pairs_of,
    read_categories,
    read_pair,
    win_rates,
)
from lit_rl.rewards.judges.pointwise import template
from lit_rl.rewards.judges.reward import JudgeReward, column
from lit_rl.types import Info

COMPARE = "Compare these two images based on the prompt: {prompt}. Which image is better?"


class UnifiedRewardThink(JudgeReward):
    """`unifiedreward_think` = wins / comparisons among the pictures of a group, in [0, 1] (Pref-GRPO, arXiv 2508.20751).

    A vision-language model sees two pictures of a prompt and names the better one; a tie is half a win. A verdict that is missing or cannot
    be read is no vote, and a picture without any vote has no score. Metrics: `first_wins`, the share of the picture that is shown first in
    all votes (0.5 is no bias); with `both_orders` also `contradictions`, the share of pairs whose two verdicts differ.

    Args:
        judge: Its address and settings. Default: $UNIFIEDREWARD_THINK_URL, else localhost:18087, model `UnifiedReward`.
        both_orders: Ask for each pair twice, each picture first once. Otherwise each picture is shown first in about half of its pairs.
        alternate: Without `both_orders`; False always shows the picture with the lower number first, as DeepGen-RL does.
        instruction: Text of the question, or the path of a file with it; `{prompt}` is replaced by the prompt.
    """

    variable, port, model = "UNIFIEDREWARD_THINK_URL", 18087, "UnifiedReward"
    outputs: Sequence[str] = ("unifiedreward_think",)
    highest = MappingProxyType({"unifiedreward_think": 1.0})
    compares = True
    wanted = WANTED

    def __init__(
        self, judge: Judge | None = None, *, both_orders: bool = False, alternate: bool = True, instruction: str = COMPARE
    ) -> None:
        super().__init__(judge)
        self.both_orders, self.alternate = both_orders, alternate
        self.instruction = template(instruction)
        self._bias, self._contradictions = (0.0, 0.0), (0.0, 0.0)

    async def score_async(self, media: Tensor, info: Sequence[Info]) -> Mapping[str, Tensor]:
        """Win rates Float64 "B" within the one group that these pictures are."""
        votes: list[Vote] = []
        if self.shows(info[0]):
            parts, text = await self.pictures(media), self.instruction.replace("{prompt}", harmless(str(info[0]["prompt"])))
            pairs = pairs_of(len(info), both=self.both_orders, alternate=self.alternate)
            votes = await asyncio.gather(*(self._vote(i, j, text, parts) for i, j in pairs))
        self._note(votes)
        self.last_error = self.client.last_error
        return {self.outputs[0]: column(self.rates(votes, len(info)))}

    def rates(self, votes: Sequence[Vote], count: int) -> list[float]:
        """The score of each of `count` pictures."""
        return win_rates(votes, count)

    def read(self, answer: str) -> tuple[float | None, Mapping[str, float]]:
        """The vote of an answer, and votes by category."""
        return read_pair(answer, labels=LABELS), {}

    async def _vote(self, first: int, second: int, text: str, parts: Sequence[Part]) -> Vote:
        reply = await self.client.ask(question(text, parts[first], parts[second]))
        if reply.text is None:
            return Vote(first, second, None)
        vote = Vote(first, second, *self.read(reply.text))
        if vote.share is None:
            self.client.note_unreadable(reply.text, self.wanted)
        return vote

    def _note(self, votes: Sequence[Vote]) -> None:
        (won, told), (against, twice) = bias(votes), contradictions(votes)
        self._bias = self._bias[0] + won, self._bias[1] + told
        self._contradictions = self._contradictions[0] + against, self._contradictions[1] + twice

    def averages(self) -> Mapping[str, tuple[float, float]]:
        """first_wins, and contradictions where pairs are judged in both orders."""
        both = {"contradictions": self._contradictions} if self.both_orders else {}
        return {**super().averages(), "first_wins": self._bias, **both}


class UnifiedRewardFlex(UnifiedRewardThink):
    """`unifiedreward_flex`: as `UnifiedRewardThink`, with a JSON verdict that also names the winner of each category.

    Score = (overall_weight * win rate + category_weight * mean win rate of the categories) / (overall_weight + category_weight).

    Args:
        instruction: Path of a file with the question, which asks for {"winner": "Image 1", "categories": [{"name", "cat_winner"}]}, or the
            text itself; `{prompt}` is replaced by the prompt.
        judge, both_orders, alternate: See `UnifiedRewardThink`.
        overall_weight: Of the overall winner.
        category_weight: Of the mean of the categories.
    """

    outputs: Sequence[str] = ("unifiedreward_flex",)
    highest = MappingProxyType({"unifiedreward_flex": 1.0})
    wanted = '{"winner": "Image 1", ...}'

    def __init__(
        self,
        instruction: str,
        judge: Judge | None = None,
        *,
        both_orders: bool = False,
        alternate: bool = True,
        overall_weight: float = 1.0,
        category_weight: float = 0.0,
    ) -> None:
        super().__init__(judge, both_orders=both_orders, alternate=alternate, instruction=instruction)
        if overall_weight < 0 or category_weight < 0 or not overall_weight + category_weight > 0:
            raise ConfigError(f"overall_weight={overall_weight}, category_weight={category_weight}: neither negative, nor both 0")
        self.overall_weight, self.category_weight = overall_weight, category_weight

    def read(self, answer: str) -> tuple[float | None, Mapping[str, float]]:
        return read_categories(answer)

    def rates(self, votes: Sequence[Vote], count: int) -> list[float]:
        overall, categories = win_rates(votes, count), category_rates(votes, count)
        return blended(overall, categories, overall_weight=self.overall_weight, category_weight=self.category_weight)
