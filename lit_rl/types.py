"""The data of an iteration: dataclasses of tensors, nothing else.

A rollout has the few fields that every method needs, and beside them whatever a method adds under names of its own: `streams` "B S",
`columns` "B" and `media`. What cuts, joins, exchanges and stores rollouts treats them by their kind, never by their names.

Axes, named once: **B** trajectories (prompts x G siblings), **S** actions per trajectory (denoising steps or tokens),
**\\*D** latent shape, **K** kept points of a denoising path (S + 1), **U** unique prompts. Time **t** is in [0, 1], 1 = noise, 0 = data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, fields, replace
from types import SimpleNamespace
from typing import Any, Self

import torch
from torch import Tensor

ALL = slice(None)

Info = Mapping[str, Any]
"""One prompt and what its file says about it. Read-only: siblings of a group share the object."""


class Answer(str):
    """The answer of a language model, without special tokens; most rewards look at nothing else.

    opened: The part of it that its prompt holds already, such as the <think> that a chat template writes. written: The text with special
    tokens, but for those that end it. special: Those that are in it.
    """

    opened: str
    written: str
    special: frozenset[str]

    def __new__(cls, text: str, *, opened: str = "", written: str | None = None, special: frozenset[str] = frozenset()) -> Self:
        self = super().__new__(cls, text)
        self.opened, self.written, self.special = opened, text if written is None else written, special
        return self


Size = tuple[int, int]
"""(height, width) in pixels."""

Media = Sequence[Sequence[Tensor]]
"""For each of B rows its pictures or other tensors, of any number and shape, such as uint8 "3 H W"; empty where no row has any."""


@dataclass
class Pictures:
    """The pictures of a micro-batch as a vision tower reads them. kinds: 1 for a token that stands for a piece of one, else 0."""

    patches: Tensor  # Float32 "P C"
    grid: Tensor  # Int "N 3"
    kinds: Tensor  # Int "B T"
    shown: bool = True  # False: no token stands for them


Cond = dict[str, Tensor]
"""Encoded prompts, one row per unique prompt ("U ..."), or one row for all ("1 ...", e.g. the empty negative prompt)."""


@dataclass
class Prompts:
    """B prompts. Equal `group` means same prompt; the ids come from the sampler, never from the text."""

    group: Tensor  # Int "B"
    info: Sequence[Info]  # B entries, read-only

    def __len__(self) -> int:
        return len(self.group)

    @property
    def text(self) -> list[str]:
        return [str(row["prompt"]) for row in self.info]

    def to(self, device: torch.device | str, **_: object) -> Self:
        """Every tensor on `device`, but those that `info` may hold."""
        result = copy(self)
        for f in fields(self):
            if f.name != "info":
                setattr(result, f.name, _moved(getattr(self, f.name), device))
        return result


@dataclass
class Rollout(Prompts):
    """Finished trajectories and everything that the loss needs of them."""

    logprobs: Tensor  # Float "B S", of the policy that acted; "B 0" where a method needs none
    mask: Tensor  # Bool "B S", True where the policy chose (and training may look)
    rewards: dict[str, Tensor] = field(default_factory=dict)  # name -> Float "B"; NaN = could not be scored
    advantages: Tensor | None = None  # Float "B S"
    weights: Tensor | None = None  # Float "B S"; the loss of an optimizer step is the sum of loss * weights over all ranks
    streams: dict[str, Tensor] = field(default_factory=dict)  # name -> "B S ...", something about each action; 0 where it has no meaning
    columns: dict[str, Tensor] = field(default_factory=dict)  # name -> "B ...", something about each row
    media: Media = ()

    def with_streams(self, **streams: Tensor) -> Self:
        """The rollout with these streams "B S" beside, or in place of, those that it has."""
        return replace(self, streams=self.streams | streams)

    def with_columns(self, **columns: Tensor) -> Self:
        """The rollout with these columns "B" beside, or in place of, those that it has."""
        return replace(self, columns=self.columns | columns)


@dataclass
class FlowRollout(Rollout):
    """Denoising paths. Only the points that training needs are kept: action s goes from latents[:, s] to latents[:, s + 1].

    Methods of the forward process keep the clean latents only (K = 1); `times` are then the S sigmas each sample is looked at.
    """

    latents: Tensor = field(default_factory=lambda: torch.empty(0))  # Float "B K *D"
    times: Tensor = field(default_factory=lambda: torch.empty(0))  # Float "B K", sigma of each kept point, falling
    cond: Cond = field(default_factory=dict)  # "U ..."
    cond_row: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))  # Int "B", row of `cond` for each trajectory
    means: Tensor | None = None  # Float "B S *D", mean of each step under the policy that acted; kept by GRPO-Guard only


@dataclass
class TokenRollout(Rollout):
    """Conversations: prompt, answer and, between two answers, what an environment said. Action s chooses tokens[:, s + 1].

    `mask` is True for the tokens that the policy sampled, the one that ends an answer included; False for prompts, for what others said
    and for padding. Padding is on the right, and only `lengths` tells where it starts: the padding token may be a token of the text.

    | stream       | contents                                                                                         | set by         |
    | `behaviour`  | log-probabilities as the sampler reported them, where they are not `logprobs`                    | all that act   |
    | `reference`  | log-probabilities of the reference, where a method needs them                                    | all            |
    | `values`     | of the critic                                                                                    | PPO            |
    | `returns`    | what the critic learns                                                                           | PPO            |

    | column       | contents                                                                                         | set by         |
    | `preference` | 1 chosen, -1 rejected, of the pair that has the same `group`; 0 for an answer of the policy      | DPO, MixedGSPO |
    | `trajectory` | equal for rows of one group that are turns of the same episode, see `lit_rl.credit.trajectories` | agents         |
    | `temperature`| of sampling and training, above 0, where siblings have different ones                            | agents         |
    """

    tokens: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))  # Int "B S+1"
    lengths: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))  # Int "B", tokens of prompt and answer
    stopped: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))  # Bool "B", False: cut off at the length limit


class Minibatch(SimpleNamespace):
    """Tensors of one forward under the names of the method that made them.

    Not a dataclass, dict or tuple on purpose: Lightning casts the floats of those to the training precision and copies them field by field.
    """

    def to(self, device: torch.device | str, **_: object) -> Self:
        return type(self)(**{name: value if name == "info" else _moved(value, device) for name, value in vars(self).items()})


class Examples(Minibatch):
    """A supervised minibatch: what to imitate, and its place in the run (so that its noise is a function of the place)."""

    info: Sequence[Info]  # B prompts
    images: Tensor | Sequence[Tensor]  # uint8 "B 3 H W", or B of various sizes "3 H W"
    step: int  # optimizer step of the warm-up
    first: int  # number of the first example within the step, counted over all processes
    weights: Tensor  # Float "B", 1 / number of examples of the step; 0 for one that only fills up

    def one(self, i: int) -> Examples:
        """Example i alone."""
        images, info, weights = self.images[i][None], self.info[i : i + 1], self.weights[i : i + 1]
        return Examples(info=info, images=images, step=self.step, first=self.first + i, weights=weights)


def take_rows(cond: Cond, rows: Tensor) -> Cond:
    """`cond[rows]` per entry; an entry with one row answers for every prompt and is expanded, not copied."""
    return {k: v[rows] if v.shape[0] > 1 else v.expand(len(rows), *v.shape[1:]) for k, v in cond.items()}


def _moved(value: object, device: torch.device | str) -> object:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: _moved(part, device) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_moved(part, device) for part in value]
    return value
