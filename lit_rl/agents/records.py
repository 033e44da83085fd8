"""Episodes as lines of a JSONL file: what was asked, said and done, without pictures. `python -m lit_rl.replay FILE` does them again.

The first line names the worlds, each other line is an episode:

| key | contents |
| --- | --- |
| `iteration`, `stage` | counted from 1; `train` or `eval` |
| `task`, `group`, `number`, `seed`, `attempt` | the task as in its file, its place in the rollout, the world's seed, earlier tries |
| `instruction`, `status`, `success`, `reward`, `seconds`, `why` | as `lit_rl.agents.episodes.Trajectory`; `reward` null: lost |
| `temperature` | of its answers, where siblings have different ones; else null |
| `turns` | `state` (a name of the screen that it was to), `text`, `action` (null: none), `error`, `prompt_tokens`, `tokens` |
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, cast

from lit_rl.agents.episodes import Trajectory
from lit_rl.envs.actions import Action
from lit_rl.envs.base import Worlds
from lit_rl.envs.failures import Limits
from lit_rl.envs.tasks import Task
from lit_rl.errors import ConfigError

VERSION = 1


def header(worlds: Worlds) -> dict[str, object]:
    """The first line: which worlds these were, as a YAML names them; options that JSON does not hold are left out."""
    cls = type(worlds)
    given = {name: getattr(worlds, name, None) for name in inspect.signature(cls).parameters if name != "limits"}
    plain = {name: value for name, value in given.items() if value is not None and _plain(value)}
    limits = asdict(worlds.limits) if is_dataclass(worlds.limits) else {}
    return {"episodes": VERSION, "worlds": {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": plain | {"limits": limits}}}


def _plain(value: object) -> bool:
    """True for what a line holds as it is."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _plain(part) for key, part in value.items())
    return all(map(_plain, value)) if isinstance(value, list) else value is None or isinstance(value, str | int | float | bool)


def record(trajectory: Trajectory, *, iteration: int, stage: str) -> dict[str, object]:
    """An episode as a line holds it."""
    task = {key: dict(value) if isinstance(value, Mapping) else value for key, value in vars(trajectory.task).items() if value is not None}
    turns = [
        {
            "state": turn.state,
            "text": turn.text,
            "action": turn.action.written() if turn.action else None,
            "error": turn.error,
            "prompt_tokens": len(turn.shown.ids),
            "tokens": len(turn.sample.ids),
        }
        for turn in trajectory.turns
    ]
    return {
        "iteration": iteration,
        "stage": stage,
        "task": task,
        "group": trajectory.group,
        "number": trajectory.number,
        "seed": trajectory.seed,
        "attempt": trajectory.attempt,
        "instruction": trajectory.instruction,
        "status": trajectory.status.value,
        "success": trajectory.success,
        "reward": None if math.isnan(trajectory.reward) else trajectory.reward,
        "seconds": round(trajectory.seconds, 3),
        "why": trajectory.why,
        "temperature": trajectory.temperature,
        "turns": turns,
    }


def read_records(file: Path) -> tuple[Worlds, list[dict[str, Any]]]:
    """The worlds of a file, not started, and its episodes. Raises ConfigError with file and line for what is none.

    A last line that was not written to its end, as a killed run leaves it, is passed over.
    """
    if not file.is_file():
        raise ConfigError(f"{file}: no such file; a run of agents writes episodes/rollouts.jsonl in its folder")
    rows: list[dict[str, Any]] = []
    *lines, unfinished = file.read_text(encoding="utf-8").split("\n")  # not at every character that Unicode ends lines by
    for number, line in enumerate([*lines, unfinished] if unfinished else lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            if rows and number > len(lines):
                break
            raise ConfigError(f"{file}:{number}: this is not JSON: {error}") from error
        wanted = "turns" if number > 1 else "worlds"
        if not isinstance(row, dict) or wanted not in row:
            raise ConfigError(f"{file}:{number}: this has no {wanted!r}: it is no line of an agent's episodes")
        rows.append(row)
    if not rows:
        raise ConfigError(f"{file} is empty: it has no first line that names the worlds")
    if rows[0].get("episodes") != VERSION:
        raise ConfigError(f"{file}:1: its layout is version {rows[0].get('episodes')}, and this release reads version {VERSION}")
    return worlds_of(rows[0]["worlds"]), rows[1:]


def worlds_of(told: Mapping[str, Any]) -> Worlds:
    """The worlds that a first line names. Raises ConfigError where there is no such class."""
    module, _, name = str(told["class_path"]).rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"worlds: there is no {told['class_path']}: {error}") from error
    if not (isinstance(cls, type) and issubclass(cls, Worlds)):
        raise ConfigError(f"worlds: {told['class_path']} is no kind of worlds (lit_rl.envs.base.Worlds)")
    options = dict(told["init_args"])
    limits = Limits(**options.pop("limits", {}))
    return cast(Worlds, cls(**options, limits=limits))


def task_from(told: Mapping[str, Any]) -> Task:
    """The task of a line."""
    return Task(**told)


def action_from(told: Mapping[str, Any]) -> Action:
    """The action of a turn."""
    given: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in told.items()}
    return Action(**given)


def written(lines: Iterable[Mapping[str, object]]) -> str:
    """Lines of the file."""
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
