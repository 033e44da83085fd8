"""Less reward for answers near the length limit."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from lit_rl.credit.tokens import overlong_penalty
from lit_rl.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LengthPenalty:
    """A reward falls linearly within the last tokens before `sampling.max_new_tokens` (DAPO, arXiv 2503.14476, eq. 13).

    Args:
        buffer: Tokens within which it falls; 0 = off.
        factor: How much lower the reward of an answer is that reaches the limit; default: 1. It takes a buffer.
    """

    buffer: int = 0
    factor: float | None = None

    def __post_init__(self) -> None:
        if self.factor is not None and not self.buffer:
            raise ConfigError(
                f"model.length_penalty.factor={self.factor} does nothing, as model.length_penalty.buffer is 0: set it to the tokens before "
                "the longest answer within which the reward falls (DAPO: a fifth of model.answers.sampling.max_new_tokens)"
            )

    def check(self, limit: int) -> None:
        """Raise ConfigError for a buffer longer than the longest answer."""
        if not 0 <= self.buffer <= limit:
            raise ConfigError(f"model.length_penalty.buffer={self.buffer} must be in 0..{limit}, the longest answer")

    def __call__(self, lengths: Int[Tensor, "B"], *, limit: int) -> Float[Tensor, "B"] | float:
        """The penalty, at most 0, of answers of these lengths."""
        factor = 1.0 if self.factor is None else self.factor
        return overlong_penalty(lengths, max_length=limit, buffer=self.buffer, factor=factor) if self.buffer else 0.0
