"""Contracts: rewards turn finished samples into numbers, and a callback collects the numbers for the method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Generic, Literal

from torch import Tensor
from typing_extensions import TypeVar

from lit_rl.types import Info

M = TypeVar("M", default=Any)
"""The finished samples: a Tensor of images, or a sequence of texts."""


class RewardError(RuntimeError):
    """Scores that the run cannot do without are missing, or a reward broke its contract. Raised on every rank alike."""


class Reward(ABC, Generic[M]):
    """A reward function over finished samples.

    `score` runs in a worker thread while the next chunk is being sampled. A reward that waits for the network overrides `score_async`
    instead. A sample that cannot be scored is NaN, never 0: it then leaves the group statistics and the loss.
    """

    outputs: Sequence[str] = ()
    """Names of the scores, where they are known before the first call; weights are then checked before any model is loaded.

    The main one, which counts where a run gives no weights, is `score`, else the first.
    """

    highest: Mapping[str, float] = MappingProxyType({})
    """The highest value of each score that has one; an evaluation then also logs the share of samples that reach it."""

    counted: Collection[str] | None = None
    """Those of its scores that have a weight in the run; None where nobody has said. Known when `check` is called."""

    medium: Literal["images", "texts"] | None = "images"
    """The kind of samples that it scores; None for a reward that takes both."""

    compares: bool = False
    """True for a reward that compares the samples of a group: each call of `score` then has one whole group, and nothing else.

    Evaluations have no groups, so such a reward is not asked there.
    """

    last_error: str = ""
    """Why samples could last not be scored; becomes part of the message that stops a run."""

    remedy: str = "correct the reward, or raise its deadline_s or timeout_s if it has one and is slow"
    """The advice for a run that stops because too many samples have no score; follows `last_error` in that message."""

    def setup(self, *, rank: int, world_size: int, device: str) -> None:
        """Called once per process before the first score, with the place of this process in the run: load models, pick a server."""

    def check(self, rows: Iterable[Info]) -> None:
        """Called before `setup` with all prompts whose answers the run will score: raise ConfigError for those that never can be."""

    @abstractmethod
    def score(self, media: M, info: Sequence[Info]) -> Mapping[str, Tensor]:
        """Scores by output name, each Float "B". media: uint8 "B 3 H W"; info: the B prompts (`info[i]["prompt"]` is the text)."""

    def explain(self, media: M, info: Sequence[Info]) -> tuple[Mapping[str, Tensor], Mapping[str, Sequence[str]]]:
        """The scores, and by name B texts worth showing beside them (what was read in the image, ...): the reward server answers both."""
        return self.score(media, info), {}

    async def score_async(self, media: M, info: Sequence[Info]) -> Mapping[str, Tensor]:
        """As `score`, awaited on the scoring loop. Default: `score` in a thread."""
        import asyncio

        return await asyncio.to_thread(self.score, media, info)

    def counters(self) -> Mapping[str, float]:
        """Totals since the start worth logging (retries, failures, ...)."""
        return {}

    def averages(self) -> Mapping[str, tuple[float, float]]:
        """Sums and counts since the start whose quotients are worth logging (seconds of an answer, shares, ...)."""
        return {}

    async def close(self) -> None:
        """Release sessions and threads; called once, on the scoring loop."""


class TextReward(Reward[Sequence[str]]):
    """A reward function over finished texts: what the policy answered, without the prompt and special tokens."""

    medium = "texts"

    @abstractmethod
    def score(self, media: Sequence[str], info: Sequence[Info]) -> Mapping[str, Tensor]:
        """Scores by output name, each Float "B". media: B answers; info: the B prompts with what their rows say about the right answer."""


class RewardQueue(ABC):
    """The rewards of a run as a method sees them; implemented by the callback that owns them (`callbacks.reward_scoring.RewardScoring`)."""

    @abstractmethod
    def submit(
        self, media: Tensor | Sequence[str], info: Sequence[Info], *, groups: Sequence[int] | None = None, place: int | None = None
    ) -> None:
        """Queue one decoded chunk, images uint8 "B 3 H W" on the CPU or B texts, and return at once.

        groups: The group id of each sample, for rewards that compare; None in evaluations.
        place: Among the chunks of the same `gather`, whose scores come in this order; None = behind those that were submitted before.
        """

    @property
    @abstractmethod
    def submitted(self) -> int:
        """Chunks since the last `gather`."""

    @abstractmethod
    def gather(self) -> dict[str, Tensor]:
        """Await everything submitted since the last call: name -> Float64 "B" in order of the chunks, NaN where scoring failed.

        Collective: raises on every rank alike when too many samples failed on any of them.
        """

    max_failed_fraction: float = 1.0
    """Share of the samples of an iteration or evaluation, in [0, 1], that may be without a score before the run is stopped."""

    @property
    def highest(self) -> Mapping[str, float]:
        """The highest value of each score that has one."""
        return {}

    @property
    @abstractmethod
    def weights(self) -> Mapping[str, float]:
        """Weight of each named reward in the total."""
