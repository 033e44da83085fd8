"""Episodes a second of worlds, and whether memory and file handles stay as they are over many.

    python -m benchmarks.worlds [--kinds tiny_desktop miniwob] [--together 1 4 16] [--episodes 200]

An episode is a fresh world, a reset, a screenshot and an action for each turn, and the evaluation: of MiniWoB++ the page click-test-2,
whose button is found in the page, of the tiny desktop the program `buttons`, by its oracle. Prints, for each number of episodes under way
at once, episodes per second by the clock and CPU seconds per episode of all processes; after a quarter of the episodes and at the end, the
memory that is of this program and its children (PSS), file handles, and processes. A browser is kept for all episodes. Buttons of the page
may lie on each other, so that a few episodes are not solved.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

import psutil

from lit_rl.envs.actions import Action
from lit_rl.envs.base import World, Worlds
from lit_rl.envs.miniwob import MiniWoB, MiniWoBs
from lit_rl.envs.tasks import Task
from lit_rl.envs.tiny_desktop import TinyDesktop, TinyDesktops

Solve = Callable[[World], Awaitable[None]]
WARM_UP = 8
"""Episodes before the first measurement."""


class Kind(NamedTuple):
    worlds: Callable[[], Worlds]
    task: Task
    solve: Solve


class Held(NamedTuple):
    """Resources of this process and those below it. memory: PSS in MiB. handles: Of this process. cpu: Seconds so far."""

    memory: float
    handles: int
    processes: int
    cpu: float


def held() -> Held:
    """The resources that are held now. Processes that have ended count in the CPU seconds of those that waited for them."""
    here = psutil.Process()
    memory, cpu, processes = 0, 0.0, 0
    for process in [here, *here.children(recursive=True)]:
        try:
            pss, times = process.memory_full_info().pss, process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        memory, processes = memory + pss, processes + 1
        cpu += times.user + times.system + times.children_user + times.children_system
    return Held(memory / 2**20, here.num_fds(), processes, cpu)


async def by_oracle(world: World) -> None:
    """The tiny desktop's own oracle."""
    assert isinstance(world, TinyDesktop)
    while not (await world.screenshot()).ended:
        await world.execute(world.oracle())


async def on_button(world: World) -> None:
    """A click on the button with the number ONE, where the page has put it."""
    assert isinstance(world, MiniWoB)
    await world.screenshot()
    box = await world.page.locator("#subbtn").bounding_box()
    assert box is not None
    await world.execute(Action(kind="click", x=box["x"] + box["width"] / 2, y=box["y"] + box["height"] / 2))
    await world.screenshot()


SOLVED = {"command": "desktop get solved", "equals": "1"}
KINDS = {
    "tiny_desktop": Kind(TinyDesktops, Task(id="b", params={"program": "buttons"}, evaluator=SOLVED), by_oracle),
    "miniwob": Kind(lambda: MiniWoBs(browser_episodes=10**6), Task(id="c", params={"page": "click-test-2"}), on_button),
}


async def episodes(kind: Kind, worlds: Worlds, seeds: Sequence[int], together: int) -> int:
    """How many of these episodes succeed; at most `together` are under way at once."""
    room = asyncio.Semaphore(together)

    async def one(seed: int) -> bool:
        async with room, worlds.world() as world:
            await world.reset(kind.task, seed)
            await kind.solve(world)
            return (await world.evaluate()).success

    return sum(await asyncio.gather(*map(one, seeds)))


async def measure(name: str, together: int, count: int) -> str:
    """A line of the table."""
    kind = KINDS[name]
    async with kind.worlds() as worlds:
        await episodes(kind, worlds, range(WARM_UP), together)
        quarter, start, before = count // 4, time.perf_counter(), held()
        done = await episodes(kind, worlds, range(quarter), together)
        middle = held()
        done += await episodes(kind, worlds, range(quarter, count), together)
        seconds, after = time.perf_counter() - start, held()
    cpu = (after.cpu - before.cpu) / count
    growth = f"{middle.memory:.0f} -> {after.memory:.0f} MiB, {middle.handles} -> {after.handles} handles"
    line = f"{name:13} {together:3} {count / seconds:7.1f}/s {cpu * 1000:7.1f} ms CPU  {growth}"
    return f"{line}, {middle.processes} -> {after.processes} processes, {done}/{count} solved"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--together", nargs="+", type=int, default=[1, 4, 16], help="episodes under way at once")
    parser.add_argument("--episodes", type=int, default=200, help="for each line")
    args = parser.parse_args()
    for name in args.kinds:
        for together in args.together:
            print(asyncio.run(measure(name, together, args.episodes)), flush=True)


if __name__ == "__main__":
    main()
