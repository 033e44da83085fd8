"""MiniWoB++ in a real browser: the contract, and what happens to browsers that die, hang, grow old or lose their program."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys

import psutil
import pytest
from contract import Supply, WorldContract

from lit_rl.envs.actions import Action, ActionError
from lit_rl.envs.base import World
from lit_rl.envs.browser import VARIABLE, find_browser
from lit_rl.envs.failures import Limits
from lit_rl.envs.miniwob import MiniWoBs
from lit_rl.envs.tasks import Task, read_tasks
from lit_rl.errors import ConfigError

try:
    find_browser()
    HERE = True
except ConfigError:
    HERE = False

in_a_browser = pytest.mark.skipif(not HERE, reason="no browser here: apt-get install chromium-headless-shell")


def test_a_browser_is_there_in_ci() -> None:
    assert HERE or not os.environ.get("CI"), "CI installs chromium-headless-shell, see .ci/run"


def browsers() -> list[psutil.Process]:
    """Browsers below this process, without their helpers and without the shell script by which Debian starts them."""
    lines = {one: _line(one) for one in psutil.Process().children(recursive=True)}
    return [
        one for one, line in lines.items() if "--remote-debugging-pipe" in line and "--type=" not in str(line) and "/bin/sh" not in line
    ]


def _line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline() if process.status() != psutil.STATUS_ZOMBIE else []
    except psutil.Error:
        return []


async def click_on(world: World, selector: str) -> None:
    """Click on what a CSS selector finds, by its place on the screen."""
    box = await world.page.locator(selector).bounding_box()  # type: ignore[attr-defined]
    await world.execute(Action(kind="click", x=box["x"] + box["width"] / 2, y=box["y"] + box["height"] / 2))


@in_a_browser
class TestMiniWoBContract(WorldContract):
    task = Task(id="sequence", params={"page": "click-button-sequence"})

    def make(self) -> MiniWoBs:
        return MiniWoBs()

    async def solve(self, world: World) -> None:
        await click_on(world, "#subbtn")
        await click_on(world, "#subbtn2")

    def test_typing_keys_scrolling_and_waiting_reach_the_page(self, supply: Supply) -> None:
        async def entered() -> bool:
            async with supply.worlds.world() as world:
                told = await world.reset(Task(id="text", params={"page": "enter-text"}), 3)
                await click_on(world, "#tt")
                await world.execute(Action(kind="type", text="x"))
                for chord in [("control", "a"), ("backspace",)]:
                    await world.execute(Action(kind="key", keys=chord))
                await world.execute(Action(kind="type", text=told.split('"')[1]))
                await world.execute(Action(kind="scroll", dy=10))
                await world.execute(Action(kind="wait", seconds=0.01))
                with pytest.raises(ActionError, match="there is no key 'f99'"):
                    await world.execute(Action(kind="key", keys=("f99",)))
                with pytest.raises(ActionError, match="there is no key ö on this keyboard"):
                    await world.execute(Action(kind="key", keys=("ö",)))
                await click_on(world, "#subbtn")
                return (await world.evaluate()).success

        assert supply.runner.run(entered())

    def test_a_page_with_a_dialog_is_shown_from_its_corner(self, supply: Supply) -> None:
        """The dialog takes the focus, and the browser would scroll to what stands beside the task."""

        async def corner() -> object:
            async with supply.worlds.world() as world:
                await world.reset(Task(id="dialog", params={"page": "click-dialog"}), 0)
                return (await world.screenshot()).image.getpixel((155, 3))

        assert supply.runner.run(corner()) == (255, 255, 0)  # the head with the instruction

    def test_nothing_is_handed_on_to_the_next_episode(self, supply: Supply) -> None:
        async def storage(write: bool) -> object:
            async with supply.worlds.world() as world:
                await world.reset(self.task, 1)
                if write:
                    await world.page.evaluate("() => { localStorage.left = 'x'; document.cookie = 'left=x'; }")
                return await world.page.evaluate("() => [localStorage.left ?? null, document.cookie]")

        assert supply.runner.run(storage(True))[0] == "x"
        assert supply.runner.run(storage(False)) == [None, ""]

    @pytest.mark.parametrize("fault", ["killed", "hung", "driver"])
    def test_a_lost_browser_is_a_failure_of_the_world_and_the_next_attempt_has_another(self, supply: Supply, fault: str) -> None:
        async def attempt(world: World, number: int) -> int:
            await world.reset(self.task, 1)
            if number == 0:
                world.limits = Limits(screenshot=1.0)
                if fault == "hung":
                    await world.page.evaluate("() => { setTimeout(() => { while (true); }, 0); }")
                else:
                    driver = next(one for one in psutil.Process().children() if "run-driver" in _line(one))
                    (driver if fault == "driver" else browsers()[0]).kill()
            await world.screenshot()
            await self.solve(world)
            assert (await world.evaluate()).success
            return number

        before = dict(supply.worlds.counts)
        assert supply.runner.run(supply.worlds.attempts(attempt)) == 1
        assert supply.worlds.counts["closed"] == before["closed"] + 2 and len(browsers()) == 1


@in_a_browser
def test_browsers_are_replaced_when_they_are_old_and_none_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    worlds = MiniWoBs(browser_episodes=2)
    task = Task(id="a", params={"page": "click-test"})

    async def run() -> tuple[int, int, int]:
        async with worlds:
            async with worlds.world() as first, worlds.world() as second, worlds.world() as third:
                for world in (first, second, third):
                    await world.reset(task, 0)
                pool, beside = worlds.pool, len(browsers())
                monkeypatch.setenv(VARIABLE, "/no/such/browser")  # from here on none can be started
            after = len(browsers())
            async with worlds.world() as world:
                await world.reset(task, 0)
            with pytest.raises(ConfigError, match=rf"{VARIABLE}=/no/such/browser in the environment is no program"):
                async with worlds.world():
                    pass
            return pool.started, beside, after

    assert asyncio.run(run()) == (2, 2, 1) and browsers() == []


CHILD = """
import asyncio, sys
from lit_rl.envs.miniwob import MiniWoBs
from lit_rl.envs.tasks import Task
async def main():
    worlds = MiniWoBs()
    await worlds.start()
    async with worlds.world() as world:
        await world.reset(Task(id="a", params={"page": "click-test"}), 0)
        print("ready", flush=True)
        await asyncio.sleep(600)
asyncio.run(main())
"""


@in_a_browser
def test_no_browser_outlives_a_python_that_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True) as python:
        try:
            assert python.stdout is not None and python.stdout.readline() == "ready\n"
            left = psutil.Process(python.pid).children(recursive=True)
            assert any("--remote-debugging-pipe" in _line(one) for one in left)
        finally:
            os.kill(python.pid, signal.SIGKILL)
    assert psutil.wait_procs(left, timeout=60)[1] == []


@pytest.mark.parametrize(
    ("params", "evaluator", "told"),
    [
        ({"page": "click-tset"}, {}, "params.page: 'click-tset' is no page of MiniWoB++; did you mean 'click-test'?"),
        ({}, {}, "params.page: None is no page of MiniWoB++; there are"),
        ({"page": "click-test", "sed": 1}, {}, "params.sed: there is no such key; there are page"),
        ({"page": "click-test"}, {"at_least": 0}, "evaluator.at_least: 0 is not a number above 0"),
        ({"page": "click-test"}, {"reward": 1}, "evaluator.reward: there is no such key"),
    ],
)
def test_tasks_name_pages_that_there_are(params: dict[str, object], evaluator: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        MiniWoBs().check(Task(id="a", params=params, evaluator=evaluator))
    assert str(caught.value).startswith(told)


def test_the_shipped_tasks_are_pages_and_held_out_seeds_are_fixed() -> None:
    train, held_out = (read_tasks(f"configs/agent/tasks/miniwob_{split}.jsonl", MiniWoBs().check) for split in ("train", "eval"))
    assert {task.params["page"] for task in train} <= {task.params["page"] for task in held_out}
    assert all(task.seed is None for task in train) and len({(task.params["page"], task.seed) for task in held_out}) == len(held_out)


def test_what_to_install_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(
        ConfigError,
        match="is on the path.*apt-get install chromium-headless-shell",
    ):
        find_browser()
