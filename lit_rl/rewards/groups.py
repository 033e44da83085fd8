"""Samples of groups that are not complete yet, and groups that are cut over processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from lit_rl.ranks import gather_objects, place
from lit_rl.types import Info

Row: TypeAlias = tuple[int, int]
"""Place of a sample: its chunk in order of submission, and its row there."""
Key: TypeAlias = tuple[int, str]
"""Id of a group, with its prompt: dynamic sampling uses an id again for another prompt."""


@dataclass
class Members:
    """Samples of one group. rows: where they stand on this process; media and info of as many samples."""

    rows: list[Row] = field(default_factory=list)
    media: list[Tensor | str] = field(default_factory=list)
    info: list[Info] = field(default_factory=list)

    def together(self) -> Tensor | list[str]:
        """The samples as a reward takes them: images uint8 "B 3 H W", or texts."""
        images = [sample for sample in self.media if isinstance(sample, Tensor)]
        return torch.stack(images) if images else [str(sample) for sample in self.media]


class OpenGroups:
    """Collects the members of groups, `size` of each, from chunks in any order."""

    def __init__(self) -> None:
        self.size = 1
        self._open: dict[Key, Members] = {}

    def add(self, group: int, row: Row, sample: Tensor | str, info: Info) -> Members | None:
        """The whole group where this sample completes it."""
        key = group, str(info["prompt"])
        members = self._open.setdefault(key, Members())
        members.rows.append(row)
        members.media.append(sample)
        members.info.append(info)
        return self._open.pop(key) if len(members.rows) == self.size else None

    def leave(self) -> dict[Key, Members]:
        """The groups that are not complete here; none are kept."""
        left, self._open = self._open, {}
        return left


@dataclass(frozen=True)
class CutGroup:
    """A group whose members are on several processes, or fewer than expected. owner: The process that has it scored."""

    key: Key
    owner: int
    whole: Members
    sizes: Sequence[int]

    def here(self, values: Tensor) -> tuple[Sequence[Row], Tensor]:
        """The members of this process, and those of `values` "B" of the whole group that are theirs."""
        rank = place()[0]
        first = sum(self.sizes[:rank])
        mine = slice(first, first + self.sizes[rank])
        return self.whole.rows[mine], values[mine]


def cut_groups(left: Mapping[Key, Members]) -> Iterator[CutGroup]:
    """The groups that are complete on no process, put together from all of them in order of rank. Collective."""
    everywhere = gather_objects({key: Members(m.rows, m.media, [dict(row) for row in m.info]) for key, m in left.items()})
    for key in sorted({key for there in everywhere for key in there}):
        parts = [there.get(key, Members()) for there in everywhere]
        whole = Members([row for p in parts for row in p.rows], [m for p in parts for m in p.media], [row for p in parts for row in p.info])
        owner = next(rank for rank, part in enumerate(parts) if part.rows)
        yield CutGroup(key, owner, whole, [len(part.rows) for part in parts])
