"""Samples of an iteration or evaluation, and who is asked about them: what a row wants, and whole groups for rewards that compare."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import TypeAlias

import torch
from torch import Tensor

from lit_rl.credit.row_weights import asks_for
from lit_rl.ranks import gather_objects, place
from lit_rl.rewards.base import Reward
from lit_rl.rewards.chunks import Chunk, Scores, Task
from lit_rl.rewards.groups import Members, OpenGroups, Row, cut_groups
from lit_rl.types import Info

Media: TypeAlias = Tensor | Sequence[str]
Start: TypeAlias = Callable[[str, Media, Sequence[Info]], Future[Mapping[str, Tensor]]]
"""Begin scoring samples by the reward of this label."""


class Submissions:
    """Chunks since the last `take`, and the tasks that came of them.

    Args:
        rewards: By label.
        names: Of their scores by label, as far as they are known.
    """

    def __init__(self, rewards: Mapping[str, Reward], names: Mapping[str, Sequence[str]]) -> None:
        self.rewards, self.names = rewards, names
        self.comparing = [label for label, reward in rewards.items() if reward.compares]
        self.groups = OpenGroups()
        self.clear()

    def clear(self) -> None:
        """Forget everything that was submitted."""
        self.chunks: list[Chunk] = []
        self.tasks: list[Task] = []
        self.groups.leave()

    def emptied(self) -> Submissions:
        """Another one for the same rewards, with nothing in it."""
        other = Submissions(self.rewards, self.names)
        other.groups.size = self.groups.size
        return other

    def add(self, media: Media, info: Sequence[Info], *, groups: Sequence[int] | None, place: int | None, start: Start) -> None:
        """Ask each reward about the rows that want it; those that compare about the groups that are whole now."""
        number = len(self.chunks)
        self.chunks.append(Chunk(info, groups, number if place is None else place))
        for label in self.rewards:
            rows = [i for i, row in enumerate(info) if asks_for(row, self.names.get(label))]
            if label not in self.comparing and rows:
                some = [info[i] for i in rows]
                self.tasks.append(Task(label, [(number, i) for i in rows], start(label, _rows_of(media, rows), some)))
        if groups is not None and self.comparing:
            for i, group in enumerate(groups):
                whole = self.groups.add(group, (number, i), media[i], info[i])
                if whole is not None:
                    self.tasks += [Task(label, whole.rows, start(label, whole.together(), whole.info)) for label in self._wanted(whole)]

    def take(self, start: Start) -> tuple[list[Chunk], list[Task]]:
        """Everything since the last call, after groups that are complete on no process were begun on one of theirs. Collective."""
        for cut in cut_groups(self.groups.leave()) if self.comparing else ():
            for label in self._wanted(cut.whole):
                mine = cut.owner == place()[0]
                self.tasks.append(Task(label, [], start(label, cut.whole.together(), cut.whole.info) if mine else None, cut))
        taken = self.chunks, self.tasks
        self.clear()
        return taken

    def _wanted(self, members: Members) -> list[str]:
        return [label for label in self.comparing if asks_for(members.info[0], self.names.get(label))]


def handed_back(tasks: Sequence[Task], scores: Sequence[Scores | None]) -> list[tuple[Sequence[Row], Scores | None]]:
    """Samples of this process with their scores, for each task; those of cut groups come from the process that had them scored. Collective.

    scores: Of each task, None where it failed or was begun elsewhere.
    """
    cut = [i for i, task in enumerate(tasks) if task.cut is not None]
    everywhere = gather_objects([scores[i] for i in cut])
    from_owner = {i: everywhere[c.owner][n] for n, i in enumerate(cut) if (c := tasks[i].cut) is not None}
    result: list[tuple[Sequence[Row], Scores | None]] = []
    for i, task in enumerate(tasks):
        own = from_owner.get(i, scores[i])
        if task.cut is None:
            result.append((task.rows, own))
            continue
        rows, _ = task.cut.here(torch.empty(len(task.cut.whole.rows)))
        result.append((rows, None if own is None else {name: task.cut.here(values)[1] for name, values in own.items()}))
    return result


def _rows_of(media: Media, rows: Sequence[int]) -> Media:
    if len(rows) == len(media):
        return media
    return media[torch.tensor(rows)] if isinstance(media, Tensor) else [media[i] for i in rows]
