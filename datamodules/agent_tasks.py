"""Tasks of agents from files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType

from datamodules.base import PromptDataModule
from lit_rl.envs.tasks import Task, read_tasks
from lit_rl.replay.sources import TaskSource
from lit_rl.types import Info


class AgentTasks(PromptDataModule, TaskSource):
    """Tasks from one JSONL file per split, one object a line with the keys of `lit_rl.envs.tasks.Task`.

    Args:
        train: Tasks of fit.
        val: Held-out tasks.
        predict: Tasks of predict; default: the held-out ones.
        repeat_val: Episodes of each held-out task in an evaluation, each with a seed of the world of its own.
        eval_batch_size, shuffle, seed: See `PromptDataModule`.
    """

    def __init__(
        self,
        train: str | None = None,
        val: str | None = None,
        predict: str | None = None,
        *,
        repeat_val: int = 1,
        eval_batch_size: int = 64,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        self.files = [Path(path).expanduser() for path in (train, val, predict) if path]
        rows = [list(map(row_of, read_tasks(Path(path).expanduser()))) if path else [] for path in (train, val, predict)]
        held_out = [row for row in rows[1] for _ in range(repeat_val)]
        super().__init__(rows[0], held_out, rows[2], eval_batch_size=eval_batch_size, shuffle=shuffle, seed=seed)

    def check_tasks(self, check: Callable[[Task], None]) -> None:
        for path in self.files:
            read_tasks(path, check)


def row_of(task: Task) -> Info:
    """A task as a row: its fields, and as `prompt` its instruction, or its id where the world writes the instruction."""
    fields = {key: dict(value) if isinstance(value, MappingProxyType) else value for key, value in vars(task).items()}
    return MappingProxyType({**fields, "prompt": task.instruction or task.id})
