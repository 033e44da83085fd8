"""Environments of gymnasium in processes, and worlds without pictures: the contract, and environments that hang, die or raise."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys

import psutil
import pytest
from contract import WorldContract

from lit_rl.envs.actions import Action, ActionError
from lit_rl.envs.base import World, Worlds
from lit_rl.envs.failures import Limits, WorldError
from lit_rl.envs.gym import GymWorlds
from lit_rl.envs.number_game import NumberGames
from lit_rl.envs.tasks import Task
from lit_rl.errors import ConfigError

LEFT, RIGHT = Action(kind="key", keys=("left",)), Action(kind="key", keys=("right",))
TASK = Task(id="a", instruction="go right", evaluator={"at_least": 1})


def corridors(**options: object) -> GymWorlds:
    limits = Limits(execute=0.5)
    return GymWorlds(env_id="gym_corridor:Corridor-v0", options=options, keys={"left": 0, "right": 1}, limits=limits)


class TestGymContract(WorldContract):
    task = TASK

    def make(self) -> Worlds:
        return corridors()

    async def solve(self, world: World) -> None:
        while not (await world.screenshot()).ended:
            await world.execute(RIGHT)

    async def finish(self) -> None:
        assert not [child for child in psutil.Process().children() if "gym_host" in str(child.cmdline())]


class TestNumberGameContract(WorldContract):
    task = Task(id="a", params={"most": 50})

    def make(self) -> Worlds:
        return NumberGames()


@pytest.mark.parametrize(
    ("fault", "told"),
    [("hang", "execute took longer than 0.5 s"), ("die", "process is gone during step"), ("raise", "RuntimeError: out of order")],
)
def test_an_environment_that_fails_is_replaced(fault: str, told: str) -> None:
    async def run() -> tuple[set[int], dict[str, int]]:
        pids = set()
        async with corridors(fault=fault) as worlds:
            for action in (LEFT, RIGHT):
                async with worlds.world() as world:
                    pids.add(world.host.process.pid)
                    await world.reset(Task(id="a", instruction="x", params={"cell": 3}, evaluator=TASK.evaluator), 0)
                    if action == RIGHT:
                        await world.execute(action)
                        assert (await world.evaluate()).details == {"return": 1.0, "ended": True}
                        continue
                    with pytest.raises(WorldError, match=told):
                        await world.execute(action)
        return pids, worlds.counts

    pids, counts = asyncio.run(run())
    assert counts == {"opened": 3, "closed": 3, "leaked": 0} and len(pids) == (1 if fault == "raise" else 2)
    assert not any(psutil.pid_exists(pid) for pid in pids)


CHILD = """
import asyncio
from lit_rl.envs.gym import HostProcess
async def main():
    host = await HostProcess.start()
    await host.ask("make", "gym_corridor:Corridor-v0", "ansi", {"fault": "hang"})
    await host.ask("reset", 0, {})
    print(host.process.pid, flush=True)
    await host.ask("step", 0)
asyncio.run(main())
"""


def test_no_environment_outlives_a_python_that_is_killed_though_it_hangs() -> None:
    paths = {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True, env=os.environ | paths) as python:
        try:
            assert python.stdout is not None
            host = psutil.Process(int(python.stdout.readline()))
        finally:
            python.kill()
    assert psutil.wait_procs([host], timeout=60)[1] == []


def test_texts_and_actions_in_json() -> None:
    worlds = GymWorlds(env_id="gym_corridor:Corridor-v0", render_mode="ansi")

    async def run() -> list[str]:
        async with worlds, worlds.world() as world:
            await world.reset(Task(id="a", instruction="x", params={"cell": 1}, evaluator=TASK.evaluator), 0)
            seen = [(await world.screenshot()).text]
            await world.execute(Action(kind="type", text=" 1"))
            for wrong in ("right", "7", "[1]"):
                with pytest.raises(ActionError, match=r"is no (JSON of an )?action of Discrete\(2\)"):
                    await world.execute(Action(kind="type", text=wrong))
            with pytest.raises(ActionError, match="key is not an action here; there are done, fail, type"):
                await world.execute(RIGHT)
            return [*seen, (await world.screenshot()).text]

    assert asyncio.run(run()) == [".X...", "..X.."]


def test_an_environment_that_there_is_not_is_told_at_the_start() -> None:
    with pytest.raises(ConfigError, match=r"the environment Nowhere-v0 cannot be made: .*NameNotFound"):
        asyncio.run(GymWorlds(env_id="Nowhere-v0").start())

    async def start(worlds: GymWorlds) -> None:
        worlds.check(TASK)
        async with worlds:
            raise AssertionError("it started")

    worlds = corridors(fault="blind")
    with pytest.raises(ConfigError, match=r"Corridor-v0 cannot be made: render of the environment failed: DependencyNotInstalled: pygame"):
        asyncio.run(start(worlds))
    assert worlds.counts == {"opened": 3, "closed": 3, "leaked": 0}
    with pytest.raises(ConfigError, match=r"evaluator.at_least: None is not a number"):
        GymWorlds(env_id="x").check(Task(id="a", instruction="x"))


def test_a_guess_is_digits() -> None:
    async def run() -> str:
        async with NumberGames().world() as world:
            await world.reset(Task(id="a", params={"most": 9}), 1)
            for wrong in ("seven", "-3", "٣", "1" * 30):
                with pytest.raises(ActionError, match="is not a number; type digits alone"):
                    await world.execute(Action(kind="type", text=wrong))
            await world.execute(Action(kind="type", text="0"))
            return (await world.screenshot()).text

    assert asyncio.run(run()) == "higher than 0"
    with pytest.raises(ConfigError, match=r"params.most: 1 is not a whole number"):
        NumberGames().check(Task(id="a", params={"most": 1}))
