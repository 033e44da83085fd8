"""Tasks of agents, and the JSONL files that they are read from."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType

from lit_rl.errors import ConfigError, listed


@dataclass(frozen=True, kw_only=True)
class Task:
    """Something to be done in a world.

    id: Its name; different in one file. instruction: The words for the policy; empty where the world writes them when it is reset, since
    they depend on the seed. params: Settings of the world for this task. evaluator: How the world tells success from failure.
    max_turns: Turns that this task allows, in place of the run's. seed: Seed of the world, in place of the run's: the task is always the
    same, as evaluations want it.
    """

    id: str
    instruction: str = ""
    params: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))
    evaluator: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))
    max_turns: int | None = None
    seed: int | None = None


KEYS = tuple(f.name for f in fields(Task))
TYPES: Mapping[str, type] = {"id": str, "instruction": str, "params": dict, "evaluator": dict, "max_turns": int, "seed": int}
WORDS = {str: "a string", dict: "an object", int: "a whole number"}


def read_tasks(path: str | Path, check: Callable[[Task], None] | None = None) -> list[Task]:
    """The tasks of a JSONL file, one object a line with the keys of `Task`; empty lines are passed over.

    check: The world's own check of a task, such as `Worlds.check`. Raises ConfigError with file, line and key for the first line that is
    no task, for an id that stands twice, for what `check` refuses, and for a file without tasks.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such task file; write one JSON object with the keys {', '.join(KEYS)} a line")
    tasks: dict[str, Task] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            task = parse_task(line)
            if task.id in tasks:
                raise ConfigError(f"id: {task.id!r} stands on an earlier line already; give each task an id of its own")
            if check is not None:
                check(task)
        except ConfigError as error:
            raise ConfigError(f"{path}:{number}: {error}") from error
        tasks[task.id] = task
    if not tasks:
        raise ConfigError(f"{path} has no task; write one JSON object with the keys {', '.join(KEYS)} a line")
    return list(tasks.values())


def parse_task(line: str) -> Task:
    """The task that a line of JSON says. Raises ConfigError, which begins with the key."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"this is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ConfigError(f"this is {type(row).__name__}, not an object with the keys {', '.join(KEYS)}")
    known_keys(row, KEYS)
    for key, value in row.items():
        if not isinstance(value, TYPES[key]) or isinstance(value, bool):
            raise ConfigError(f"{key}: {json.dumps(value)} is not {WORDS[TYPES[key]]}")
    if not row.get("id"):
        raise ConfigError("id: it is missing; each task has a name of its own")
    for key, least in (("max_turns", 1), ("seed", 0)):
        if row.get(key, least) < least:
            raise ConfigError(f"{key}: {row[key]} is too little; it is at least {least}")
    return Task(**row)


def known_keys(row: Mapping[str, object], keys: Sequence[str], where: str = "") -> None:
    """Raises ConfigError for a key of `row` that is not among `keys`, with the nearest that is. where: A prefix such as `params.`."""
    for key in row:
        if key not in keys:
            near = difflib.get_close_matches(key, keys, 1)
            hint = (
                f"did you mean {near[0]!r}?" if near else f"there are {listed(sorted(keys), shown=len(keys))}" if keys else "there is none"
            )
            raise ConfigError(f"{where}{key}: there is no such key; {hint}")
