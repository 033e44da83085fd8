"""The base of rewards that ask a judge: its client, and captions that no judge is shown."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lit_rl.errors import ConfigError
from lit_rl.rewards.base import Reward
from lit_rl.rewards.judges.client import Judge, JudgeClient
from lit_rl.rewards.judges.messages import Part, picture, states_verdict
from lit_rl.rewards.quotes import SHOWN
from lit_rl.types import Info


class JudgeReward(Reward[Tensor]):
    """Base of rewards that ask a judge. A picture that it gives no score is NaN, and `last_error` says why.

    A caption that says what a judge says to give its verdict (`<answer>`, `Image 1 is better`, `Final Score:`, ...) is shown to no judge:
    repeated in an answer it could pass for the judge's own. `check` names such prompts before a run, and their pictures have no score.

    Args:
        judge: Its address and settings; a `model` or `urls` left out are those of the reward.
    """

    variable = "JUDGE_URL"
    """Environment variable with the judge's address."""
    port = 8000
    """On this machine, where nobody names an address."""
    model = "judge"
    """Name under which the model is served."""
    remedy = "look at the judge's log; raise judge.timeout_s, judge.deadline_s or judge.max_tokens if that is what it lacks"

    def __init__(self, judge: Judge | None = None) -> None:
        self.judge = judge or Judge()
        self.client = JudgeClient(self.judge, variable=self.variable, port=self.port, model=self.model)

    def check(self, rows: Iterable[Info]) -> None:
        """Raises ConfigError that names prompts which speak as a judge does."""
        wrong = [row for row in rows if states_verdict(str(row["prompt"]))]
        if wrong:
            shown = [f"{row.get('where') or row.get('id') or 'prompt'}: {str(row['prompt'])[:200]!r}" for row in wrong[:SHOWN]]
            more = [f"... and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else []
            head = f"{len(wrong)} prompts say what a judge says to give its verdict, so {type(self).__name__} shows them to none"
            raise ConfigError("\n  ".join([f"{head}: write them in other words, or leave them out", *shown, *more]))

    def setup(self, *, rank: int, world_size: int, device: str) -> None:
        """Look whether the judge answers and serves the model. Raises ConfigError."""
        self.client.setup(rank=rank, world_size=world_size)

    def score(self, media: Tensor, info: Sequence[Info]) -> Mapping[str, Tensor]:
        """As `score_async`, from code without a loop: connects, scores, disconnects."""

        async def once() -> Mapping[str, Tensor]:
            try:
                return await self.score_async(media, info)
            finally:
                await self.close()

        return asyncio.run(once())

    async def pictures(self, media: Tensor) -> list[Part]:
        """Each picture once, encoded in a thread: a group's picture is shown many times."""
        return await asyncio.to_thread(lambda: [picture(image, self.judge.encoding) for image in media])

    def shows(self, row: Info) -> bool:
        """False, with the reason noted, for a row whose caption no judge is shown."""
        if states_verdict(str(row["prompt"])):
            self.client.note_failure(
                f"the prompt {str(row['prompt'])[:80]!r} says what a judge says to give its verdict; it is shown to none"
            )
            return False
        return True

    def counters(self) -> Mapping[str, float]:
        """Those of the client."""
        return self.client.counters()

    def averages(self) -> Mapping[str, tuple[float, float]]:
        """Those of the client."""
        return self.client.averages()

    async def close(self) -> None:
        """Close the client's session."""
        self.last_error = self.client.last_error
        await self.client.close()


def column(values: Sequence[float | None]) -> Tensor:
    """Float64 "B", NaN for None."""
    return torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float64)
