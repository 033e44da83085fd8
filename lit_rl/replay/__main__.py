"""Do the episodes of an agent's run again: the same actions in the same worlds, and the screens compared.

python -m lit_rl.replay outputs/RUN/episodes/rollouts.jsonl [--limit 20] [--stage eval]
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lit_rl.agents.records import action_from, read_records, task_from
from lit_rl.envs.actions import ActionError
from lit_rl.envs.base import World, Worlds
from lit_rl.envs.failures import Status, WorldError
from lit_rl.errors import ConfigError
from lit_rl.net.env_file import use_env_file


class Verdict(NamedTuple):
    """An episode done again. wrong: The first difference, empty where there is none."""

    name: str
    wrong: str


async def again(world: World, row: dict[str, Any]) -> str:
    """Do one episode again; the first difference, or an empty string."""
    await world.reset(task_from(row["task"]), row["seed"])
    for number, turn in enumerate(row["turns"], 1):
        seen = await world.screenshot()
        if seen.key != turn["state"]:
            return f"turn {number} begins with another screen than was recorded ({seen.key}, not {turn['state']})"
        if turn["action"] is None:
            continue
        try:
            await world.execute(action_from(turn["action"]))
        except ActionError as error:
            if not turn["error"]:
                return f"turn {number}: {turn['action']} was carried out in the record, and is not now: {error}"
    await world.screenshot()
    outcome = await world.evaluate()
    if outcome.success != row["success"] and row["status"] != Status.PARSE_ERROR:  # which no evaluation makes a success
        return f"it ends in {'success' if outcome.success else 'failure'} now, and was recorded as {row['status']}"
    return ""


async def replayed(worlds: Worlds, rows: Sequence[dict[str, Any]]) -> list[Verdict]:
    """All episodes that were not lost, one after the other."""
    found = []
    async with worlds:
        for row in rows:
            name = f"iteration {row['iteration']} {row['stage']} {row['task']['id']} #{row['number']}"
            try:
                async with worlds.world() as world:
                    found.append(Verdict(name, await again(world, row)))
            except WorldError as error:
                found.append(Verdict(name, str(error)))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Print each episode that differs. Returns 0 where none does, 1 where one does, 2 for a file that cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m lit_rl.replay", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("file", type=Path, help="rollouts.jsonl of a run")
    parser.add_argument("--limit", type=int, default=None, help="only the first so many episodes")
    parser.add_argument("--stage", choices=("train", "eval"), default=None, help="only those of rollouts, or of evaluations")
    options = parser.parse_args(argv)
    try:
        use_env_file()
        worlds, rows = read_records(options.file)
        chosen = [row for row in rows if row["reward"] is not None and options.stage in (None, row["stage"])][: options.limit]
        found = asyncio.run(replayed(worlds, chosen))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    for name, wrong in found:
        if wrong:
            print(f"{name}: {wrong}")
    lost = len(rows) - sum(row["reward"] is not None for row in rows)
    print(f"{sum(not wrong for _, wrong in found)} of {len(found)} episodes went as before ({lost} were lost then and left out)")
    return int(any(wrong for _, wrong in found))


if __name__ == "__main__":
    sys.exit(main())
