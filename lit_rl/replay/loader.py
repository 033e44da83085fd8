"""The training data loader of an epoch: a rollout, replayed in minibatches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from lit_rl.types import Minibatch


class Replayed(Protocol):
    """A method whose epochs are served as minibatches."""

    def minibatches_per_epoch(self) -> int: ...

    def minibatches_done(self) -> int: ...

    def replay(self, indices: range) -> Iterator[Minibatch]: ...


class ReplayLoader:
    """The loader that Lightning iterates in one epoch: collects the rollout at its first `next()`, then replays it in seeded minibatches.

    Sized, so that nothing is fetched ahead; stateful, so that a checkpoint inside an epoch continues at the next minibatch;
    no `DataLoader`, so that no strategy replaces its sampler. Built anew for every epoch, because the warm-up epoch is longer.
    """

    def __init__(self, module: Replayed) -> None:
        self.module = module
        self.start = 0

    def __len__(self) -> int:
        return self.module.minibatches_per_epoch()

    def __iter__(self) -> Iterator[Minibatch]:
        start, self.start = self.start, 0
        if start < len(self):
            yield from self.module.replay(range(start, len(self)))

    def state_dict(self) -> dict[str, int]:
        return {"start": self.module.minibatches_done()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["start"]
