"""The contract of a method: the stations of an iteration that each method implements for itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from torch import Tensor

from lit_rl.errors import ConfigError
from lit_rl.losses.terms import Terms
from lit_rl.replay.sources import PromptSource
from lit_rl.types import Examples, Minibatch, Prompts, Rollout

R = TypeVar("R", bound=Rollout)


class Method(ABC, Generic[R]):
    """The interface that `lit_rl.modules.base.LitRL` runs: it has neither state nor a constructor."""

    samples, actions = "images", "pairs"
    """Plural nouns for the B rows of a rollout, and for its B times S actions."""
    stored_with: Sequence[str] = ()
    """Options, beside those of its bases, that a rollout depends on after it was made: inside an iteration a run keeps them."""
    sources: Sequence[Callable[..., PromptSource]] = (PromptSource,)
    """Protocols of the datamodule that the method uses."""
    datamodules: str = "datamodules.prompts.PromptFiles"
    """A datamodule that has them, for messages."""
    asks_once = True
    """A rollout's prompts are `ask(iteration)`, all of them or some."""
    drops = False
    """Dropout, that of the model's settings and that of adapters, is active while the policy trains."""

    @abstractmethod
    def collect(self, prompts: Prompts) -> R:
        """Let the policy act on `prompts` and submit each finished chunk to `self.reward_queue` while the next one is sampled."""

    @abstractmethod
    def credit(self, rollout: R) -> R:
        """`rollout.rewards` -> advantages "B S" and weights "B S"."""

    @property
    @abstractmethod
    def updates(self) -> int:
        """Optimizer steps of one pass over a rollout."""

    @abstractmethod
    def split(self, rollout: R, inner_epoch: int) -> Sequence[Tensor]:
        """Rows of each minibatch of one pass: `updates` times `micro_batches_per_update` of them."""

    @abstractmethod
    def minibatch(self, rollout: R, rows: Tensor) -> Minibatch:
        """The rows of a rollout that one forward needs, on `self.device`."""

    @abstractmethod
    def loss(self, minibatch: Minibatch) -> Terms:
        """The paper's loss as named terms, e.g. {"policy": Term(losses, weights), "kl": Term(kl, weights, coef=0.1)}."""

    @abstractmethod
    def restore_rollout(self, fields: dict[str, Any]) -> R:
        """The method's own dataclass from its plain fields."""

    def supervised_terms(self, batch: Examples) -> Terms:
        """The loss of examples, where a method takes `supervised`."""
        raise ConfigError(f"{type(self).__name__} imitates no examples")

    def examples(self, step: int, part: int, parts: int) -> Examples:
        """This process's share of micro-batch `part` of the `parts` of an optimizer step on examples, where a method takes `supervised`."""
        raise ConfigError(f"{type(self).__name__} imitates no examples")

    def needs_rewards(self) -> bool:
        """Rewards are part of the loss."""
        return True

    def count_actions(self, batch: Minibatch) -> int:
        """Actions that a minibatch trains; examples are none."""
        return 0 if isinstance(batch, Examples) else batch.weights.numel()

    def judged(self, rewards: dict[str, Tensor], batches: Sequence[Prompts]) -> dict[str, Tensor]:
        """Rewards of the evaluated samples, NaN where there is nothing to score."""
        return rewards
