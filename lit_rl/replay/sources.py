"""Protocols between a method and its datamodule: each names the data that one kind of method asks for.

| protocol | rows | asked by | datamodules |
| --- | --- | --- | --- |
| `PromptSource` | prompts of an iteration | every method | all |
| `ExampleSource` | prompts with images to imitate | supervised warm-up and loss of flow methods | `RenderedText`, `Inpainting` |
| `TextSource` | prompts as tokens | methods whose policy answers | `TextPrompts`, `PromptsAndPairs` |
| `TaskSource` | tasks of agents | AgentGRPO | `AgentTasks` |
| `PairSource` | two answers, one preferred, as tokens | DPO, MixedGSPO | `PreferencePairs`, `PromptsAndPairs` |
| `SupervisedSource` | conversations as tokens, some of them learned | SFT | `SupervisedText` |

A datamodule inherits from the protocols that it serves; a duck-typed one is taken too.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar, cast

from torch import Tensor

from lit_rl.envs.tasks import Task
from lit_rl.errors import ConfigError
from lit_rl.types import ALL, Info


class PromptSource(Protocol):
    """Prompts to act on."""

    @abstractmethod
    def prompts(self, iteration: int, count: int) -> Sequence[Info]:
        """The `count` prompts of an iteration, the same on every rank, a function of (seed, iteration) alone."""


class PictureSource(Protocol):
    """Images that a flow model is to imitate, with their prompts."""

    @abstractmethod
    def examples(self, step: int, count: int, part: slice = ALL) -> tuple[Sequence[Info], Tensor | Sequence[Tensor]]:
        """Those of the `count` supervised examples of an optimizer step that are in `part`: prompts, and images uint8 "B 3 H W".

        Images of various sizes are B of "3 H W". They are a function of (seed, step, count), whatever the parts.
        """


class ExampleSource(PromptSource, PictureSource, Protocol):
    """Prompts to act on, and images to imitate."""


class TextSource(PromptSource, Protocol):
    """Prompts that a language model answers."""

    max_prompt_length: int
    """Tokens of the longest prompt that is ever given out."""

    @abstractmethod
    def prompt_ids(self, info: Info) -> list[int]:
        """Token ids of a prompt, ready for an answer."""


class TaskSource(PromptSource, Protocol):
    """Tasks that an agent does in a world: rows with the keys of `lit_rl.envs.tasks.Task`."""

    @abstractmethod
    def check_tasks(self, check: Callable[[Task], None]) -> None:
        """Raise ConfigError with file and line of the first task of any split that `check` refuses."""


class PairSource(PromptSource, Protocol):
    """Preferences between two answers to a prompt."""

    train_prompts: Sequence[Info]
    """All pairs of fit."""
    held_out: Sequence[Info]
    """All pairs of validate and test."""
    max_length: int
    """Tokens of the longest prompt with an answer."""

    @abstractmethod
    def pair_ids(self, info: Info) -> tuple[list[int], Sequence[int], Sequence[int]]:
        """Token ids of the prompt, of the answer that was preferred and of the other one, each answer with its end.

        An answer may say which of its tokens are learned (`lit_rl.policies.chat.AnswerIds`); else all are.
        """


class SupervisedSource(PromptSource, Protocol):
    """Conversations that a language model is to imitate."""

    max_length: int
    """Tokens of the longest conversation."""

    @abstractmethod
    def supervised_ids(self, info: Info) -> tuple[list[int], list[bool]]:
        """Token ids, and which of them are supervised."""


S = TypeVar("S")
Kind = Callable[..., S]
"""A protocol; `type[S]` would be a class that can be instantiated."""


def members(source: Kind[Any]) -> list[str]:
    """Names of the methods and then of the attributes that a protocol asks for, its bases' first."""
    own = [cls for cls in reversed(inspect.getmro(cast(type, source))) if cls.__module__ == source.__module__]
    names = [name for part in ([vars(cls) for cls in own], [cls.__annotations__ for cls in own]) for found in part for name in found]
    return list(dict.fromkeys(name for name in names if not name.startswith("_")))


def source_of(data: object, kind: Kind[S], *, who: str, use: str) -> S:
    """`data` as a source of this kind. Raises ConfigError that names what it lacks.

    who: The method that asks, for the message. use: Datamodules that have it.
    """
    missing = [name for name in members(kind) if not hasattr(data, name)]
    if missing:
        raise ConfigError(
            f"data: {type(data).__name__} has no `{missing[0]}`, which {who} asks for: use {use}, or a datamodule of yours with "
            f"{', '.join(missing)}, see lit_rl.replay.sources.{kind.__name__}"
        )
    return cast(S, data)


def datamodule_of(trainer: object, *, use: str) -> PromptSource:
    """The datamodule of a trainer. Raises ConfigError where it has none. use: A datamodule for the message."""
    datamodule: PromptSource | None = getattr(trainer, "datamodule", None)
    if datamodule is None:
        raise ConfigError(f"the run has no data: give a datamodule, e.g. {use}")
    return datamodule
