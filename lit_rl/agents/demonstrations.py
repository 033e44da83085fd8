"""Episodes as rows for supervised training: those of an oracle, and those that a policy did well."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from PIL import Image

from lit_rl.agents.episodes import Episode, Shown, Trajectory
from lit_rl.agents.play import Episodes, jobs_of
from lit_rl.envs.actions import Action
from lit_rl.envs.base import World
from lit_rl.envs.tasks import Task
from lit_rl.errors import ConfigError
from lit_rl.policies.base import TokenPolicy
from lit_rl.rollouts.base import Request, Sample


@runtime_checkable
class Knowing(Protocol):
    """A world that knows the next right action."""

    def oracle(self) -> Action: ...


class OracleEpisode(Episode):
    """An episode whose answers are the world's own right ones, written in the dialect of the codec."""

    async def answer(self, world: World, request: Request, shown: Shown) -> Sample:
        """The next right action. Raises ConfigError for worlds that do not know it."""
        if not isinstance(world, Knowing):
            raise ConfigError(f"{type(world).__name__} knows no right actions, so there is nothing to demonstrate: use the tiny desktop")
        ids = self.policy.encode(self.codec.write(world.oracle(), shown.screen))
        return Sample([*ids, self.policy.stop_ids[0]], [0.0] * (len(ids) + 1), "stop")


def demonstrate(policy: TokenPolicy, episodes: Episodes, tasks: Sequence[Task], *, seed: int = 0) -> list[Trajectory]:
    """The oracle's trajectory of each task. policy: reads and writes tokens; its weights are not asked."""
    return episodes.play_with(
        OracleEpisode, policy, _Nobody(), jobs_of([(task, i, 0) for i, task in enumerate(tasks)], seed=seed, place=("demo",))
    )


def write_rows(trajectories: Iterable[Trajectory], file: Path, *, only_successes: bool = True) -> int:
    """Turns as conversations with images, for `datamodules.supervised.SupervisedText`: the rows that were written.

    file: A .jsonl file; its pictures go into a folder of the same name beside it. A turn whose answer was no action is left out.
    """
    folder = file.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, trajectory in enumerate(t for t in trajectories if t.success or not only_successes):
        for place, turn in enumerate(trajectory.turns):
            if turn.action is None:
                continue
            names = []
            for i, picture in enumerate(turn.shown.pictures):
                names.append(f"{folder.name}/{number}-{place}-{i}.png")
                Image.fromarray(picture.permute(1, 2, 0).numpy()).save(file.parent / names[-1])
            messages = [*turn.shown.messages, {"role": "assistant", "content": turn.text}]
            rows.append({"messages": messages, **({"images": names} if names else {}), "id": f"{trajectory.task.id}-{number}-{place}"})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return len(rows)


class _Nobody:
    """A desk at which nobody sits."""

    async def answer(self, request: Request) -> Sample:
        raise AssertionError("an oracle asks nobody")
