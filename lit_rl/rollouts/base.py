"""Who turns prompts into answers: tokens in, tokens and log-probabilities out, never through text."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from lit_rl.errors import ConfigError
from lit_rl.policies.base import TokenPolicy
from lit_rl.seeding import Key
from lit_rl.types import Info


class RolloutError(RuntimeError):
    """Answers that the run cannot do without do not come, or come from other weights than the policy's."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn from softmax(logits / temperature).

    The reported log-probabilities are those of the whole distribution at `temperature` (at 1 where that is 0), as a trainer computes them.

    Args:
        max_new_tokens: An answer is cut off after so many.
        temperature: Logits are divided by it; 0 takes the likeliest token.
        top_p: Draw from the likeliest tokens that hold this share of the probability.
        top_k: Draw from so many likeliest tokens; 0 from all.
    """

    max_new_tokens: int = 1024
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"sampling.max_new_tokens={self.max_new_tokens} must be at least 1")
        if self.temperature < 0:
            raise ConfigError(f"sampling.temperature={self.temperature} must not be negative; 0 takes the likeliest token")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"sampling.top_p={self.top_p} must be in (0, 1]")
        if self.top_k < 0:
            raise ConfigError(f"sampling.top_k={self.top_k} must not be negative; 0 draws from all tokens")


@dataclass(frozen=True, kw_only=True)
class EvalSampling:
    """Sampling of evaluation and prediction. Default: the likeliest ones, answers as long as in rollouts.

    Args:
        max_new_tokens: An answer is cut off after so many; None = as many as in rollouts.
        temperature: Logits are divided by it; None = 0, which takes the likeliest token.
        top_p: Draw from the likeliest tokens that hold this share of the probability; None = 1, all. For a temperature above 0.
        top_k: Draw from so many likeliest tokens; None = 0, all. For a temperature above 0.
    """

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None

    def __post_init__(self) -> None:
        given = {"top_p": self.top_p not in (None, 1), "top_k": self.top_k not in (None, 0)}
        for name in [name for name, chooses in given.items() if chooses and not self.temperature]:
            raise ConfigError(
                f"eval_sampling.{name}={getattr(self, name)} chooses among tokens that are drawn, and evaluation takes the likeliest: set "
                f"eval_sampling.temperature too (1.0 draws as the model says), or leave {name} out"
            )

    def over(self, rollouts: Sampling) -> Sampling:
        """The sampling of evaluation, completed by that of rollouts. Raises ConfigError for values out of range."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        try:
            return Sampling(**{"max_new_tokens": rollouts.max_new_tokens, "temperature": 0.0} | given)
        except ConfigError as error:
            raise ConfigError(f"eval_{error}") from error


@dataclass(frozen=True)
class Request:
    """One answer that is wanted. `key` is all that its randomness depends on: never its place in a batch."""

    prompt: Sequence[int]
    key: tuple[Key, ...]
    media: Sequence[Tensor] = ()  # of the prompt, as `TokenPolicy.media` gives them
    row: Info = field(default_factory=dict)  # of the data, whose conversation servers of chat completions are sent with its images
    temperature: float | None = None  # of this answer alone, above 0; None = the sampling's

    def sampling(self, general: Sampling) -> Sampling:
        """How this answer is drawn."""
        return general if self.temperature is None else replace(general, temperature=self.temperature)


def temperatures(requests: Sequence[Request], sampling: Sampling, device: torch.device) -> float | Tensor:
    """The temperature of all these answers; Float32 "N" of each where one has its own."""
    if all(request.temperature is None for request in requests):
        return sampling.temperature
    return torch.tensor([request.sampling(sampling).temperature for request in requests], device=device)


@dataclass
class Sample:
    """One answer. `ids` ends with the stop token where the policy stopped by itself."""

    ids: list[int]
    logprobs: list[float]  # of each of `ids`
    finish: Literal["stop", "length"]
    versions: list[int] = field(default_factory=list)  # of the weights that drew each of `ids`, where an engine tells


class RolloutEngine(ABC):
    """Answers requests with the policy's present weights."""

    max_model_len: int | None = None
    """Tokens of prompt and answer together that it takes at most, where that is known after `setup`."""

    has_copy = False
    """True when it answers from a copy of the weights, so that `begin` works."""

    def setup(self, policy: TokenPolicy, *, rank: int, world_size: int) -> None:
        """Called once per process before the first request, after the policy is loaded and in its place."""
        self.policy = policy

    def update_weights(self, version: int) -> None:  # noqa: B027  (an engine over the training weights has nothing to do)
        """Called on all processes before each rollout: from here on answers come from the policy's present weights. Collective."""

    @abstractmethod
    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Sample]:
        """Answers in order of the requests. Neighbours with the same prompt share its prefill."""

    def stream(self, chunks: Sequence[Sequence[Request]], sampling: Sampling) -> Iterator[tuple[int, list[Sample]]]:
        """(place, answers) of each chunk as soon as they are there. As many chunks on every process; some may be empty."""
        for place, chunk in enumerate(chunks):
            yield place, self.generate(chunk, sampling)

    def begin(self, requests: Sequence[Request], sampling: Sampling) -> Future[list[Sample]]:
        """`generate` in the background, with the weights of the last `update_weights` whatever the policy trains meanwhile.

        Callers wait for it before the next `update_weights`.
        """
        raise NotImplementedError(f"{type(self).__name__} answers from the weights that train")

    @contextmanager
    def awake(self) -> Iterator[None]:
        """A block in which `answer` may be called. Collective at its beginning and its end."""
        yield

    async def answer(self, request: Request, sampling: Sampling) -> Sample:
        """One answer of an engine with a copy of the weights, while the caller's event loop goes on. Raises what `begin` raises."""
        return (await asyncio.wrap_future(self.begin([request], sampling)))[0]

    def close(self) -> None:  # noqa: B027
        """Release connections and memory."""
