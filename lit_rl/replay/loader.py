"""The training data loader of an epoch: a rollout, replayed in minibatches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Generic, Protocol, TypeVar

import lightning as L
from torch import Tensor

from lit_rl.checkpoints.progress import minibatches_done
from lit_rl.replay.plan import Part, rollout_plan, warmup_plan
from lit_rl.types import Examples, Minibatch, Rollout

R = TypeVar("R", bound=Rollout)


class Replayed(Protocol[R]):
    """A method whose epochs are served as minibatches; `lit_rl.modules.base.LitRL` describes each of these."""

    trainer: L.Trainer
    inner_epochs: int
    example_micro_batches: int
    warmup_micro_batches: int

    @property
    def updates(self) -> int: ...
    @property
    def iteration(self) -> int: ...
    @property
    def warmup_steps(self) -> int: ...
    @property
    def warming_up(self) -> bool: ...
    def micro_batches_of_step(self, *, warmup: bool) -> int: ...
    def accumulate(self) -> None: ...
    def current_rollout(self) -> R: ...
    def split(self, rollout: R, inner_epoch: int) -> Sequence[Tensor]: ...
    def minibatch(self, rollout: R, rows: Tensor) -> Minibatch: ...
    def examples(self, step: int, part: int, parts: int) -> Examples: ...


class ReplayLoader(Generic[R]):
    """The loader that Lightning iterates in one epoch: collects the rollout at its first `next()`, then replays it in seeded minibatches.

    Sized, so that nothing is fetched ahead; stateful, so that a checkpoint inside an epoch continues at the next minibatch;
    no `DataLoader`, so that no strategy replaces its sampler. Built anew for every epoch, because the warm-up epoch is longer.
    """

    def __init__(self, module: Replayed[R]) -> None:
        self.module = module
        self.start = 0

    def __len__(self) -> int:
        module = self.module
        steps = module.warmup_steps if module.warming_up else module.inner_epochs * module.updates
        return steps * module.micro_batches_of_step(warmup=module.warming_up)

    def __iter__(self) -> Iterator[Minibatch]:
        start, self.start = self.start, 0
        if start < len(self):
            yield from self.replay(start)

    def replay(self, start: int) -> Iterator[Minibatch]:
        """The minibatches of the present epoch from number `start` on."""
        module = self.module
        module.accumulate()
        if module.warming_up:
            for part in warmup_plan(steps=module.warmup_steps, micro_batches=module.warmup_micro_batches)[start:]:
                yield self.examples(part, parts=module.warmup_micro_batches)
            return
        rollout = module.current_rollout()
        for part in self.plan(rollout)[start:]:
            of_rollout = part.source == "rollout"
            yield module.minibatch(rollout, part.rows) if of_rollout else self.examples(part, parts=module.example_micro_batches)

    def plan(self, rollout: R) -> list[Part]:
        """The minibatches of an iteration in order: `inner_epochs` passes over the rollout, with the examples of each optimizer step."""
        module = self.module
        rows = [rows for inner_epoch in range(module.inner_epochs) for rows in module.split(rollout, inner_epoch)]
        updates = module.inner_epochs * module.updates
        first = module.warmup_steps + module.iteration * updates
        return rollout_plan(rows, updates=updates, examples=module.example_micro_batches, first=first)

    def examples(self, part: Part, *, parts: int) -> Examples:
        """The supervised minibatch of a part of the plan."""
        step, i = part.rows.tolist()
        return self.module.examples(step, i, parts)

    def state_dict(self) -> dict[str, int]:
        return {"start": minibatches_done(self.module.trainer)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["start"]
