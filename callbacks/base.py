"""The base of all callbacks: Lightning's hooks and those that a method calls, and a misspelt one is an error."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import NotRequired, TypeAlias, TypedDict, TypeVar

import lightning as L
from torch import Tensor

from lit_rl.agents.episodes import Trajectory
from lit_rl.errors import ConfigError
from lit_rl.modules.base import LitRL
from lit_rl.types import Info, Prompts, Rollout, TokenRollout

C = TypeVar("C", bound=L.Callback)

Method: TypeAlias = LitRL[Rollout]
"""The LightningModule that calls the hooks."""


def method_of(module: L.LightningModule) -> Method:
    """The module as a method: Lightning's own hooks have the type of any module."""
    return module  # type: ignore[return-value]


Media: TypeAlias = Tensor | Sequence[str]
"""Finished samples of a micro-batch: images uint8 "B 3 H W" or B answers."""


class Predicted(TypedDict):
    """The output of a predict step: its prompts with an image or a text of each."""

    prompts: Prompts
    media: NotRequired[Tensor]  # uint8 "B 3 H W"
    texts: NotRequired[list[str]]


class RLCallback(L.Callback):
    """A Lightning callback with the hooks of an iteration. Every hook runs on every process.

    A method named `on_...` that neither Lightning nor a method calls raises TypeError when the class is defined: it would never run.
    """

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        known = {name for base in cls.__mro__[1:] for name in vars(base) if name.startswith("on_")}
        for name in vars(cls):
            if name.startswith("on_") and name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                meant = f"; did you mean {near[0]}?" if near else ""
                raise TypeError(f"{cls.__name__}.{name} is no hook and would never be called{meant} (callbacks/base.py has the hooks)")

    def on_phase_start(self, trainer: L.Trainer, module: Method, name: str) -> None:
        """A phase begins: `rollout` (sampling) or `score` (waiting for rewards)."""

    def on_phase_end(self, trainer: L.Trainer, module: Method, name: str) -> None:
        """A phase ends, by an error too."""

    def on_rollout_chunk(self, trainer: L.Trainer, module: Method, media: Media, info: Sequence[Info], total: int) -> None:
        """A micro-batch was sampled. media: images uint8 "B 3 H W" or B answers; total: samples of the whole rollout here."""

    def on_rollout_chosen(self, trainer: L.Trainer, module: Method, rollout: TokenRollout) -> None:
        """DAPO has chosen the groups to train on among all that it sampled."""

    def on_trajectories(self, trainer: L.Trainer, module: Method, trajectories: Sequence[Trajectory]) -> None:
        """Episodes of an agent have ended, of a rollout or, while `trainer.training` is False, of an evaluation."""

    def on_rollout_end(self, trainer: L.Trainer, module: Method, rollout: Rollout) -> None:
        """The rollout has its rewards and advantages. Numbers added to `module.rollout_metrics` are logged with the iteration."""

    def on_evaluation_end(self, trainer: L.Trainer, module: Method, prompts: Prompts, rewards: Mapping[str, Tensor]) -> None:
        """The held-out prompts of this process have their rewards, Float64 "B" by name, NaN where there is none."""


def callbacks_of(trainer: L.Trainer, kind: type[C]) -> list[C]:
    """The callbacks of a class, its subclasses included, in the trainer's order."""
    return [callback for callback in getattr(trainer, "callbacks", ()) if isinstance(callback, kind)]


def is_trial(trainer: L.Trainer) -> bool:
    """True for a run of a few minibatches (`--trainer.fast_dev_run`), which leaves no checkpoint."""
    return bool(getattr(trainer, "fast_dev_run", False))


def check_alone(trainer: L.Trainer, kind: type[L.Callback], remedy: str) -> None:
    """Raise ConfigError where a run has several callbacks of a class that it can have one of. In `setup`, before any model is loaded."""
    found = [type(callback).__name__ for callback in callbacks_of(trainer, kind)]
    if len(found) > 1:
        raise ConfigError(f"trainer.callbacks has {' and '.join(found)}, of which a run can have one: {remedy}")
