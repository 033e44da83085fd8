"""Actions, task files, validators, and the table of how episodes end."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path

import pytest

from lit_rl.envs.actions import Action, ActionError
from lit_rl.envs.base import Observation, Outcome, World, Worlds
from lit_rl.envs.failures import Limits, Status, WorldError
from lit_rl.envs.tasks import Task, read_tasks
from lit_rl.envs.validators import Printed, parse_validators, validate
from lit_rl.errors import ConfigError


def test_what_the_policy_causes_counts_and_nothing_else() -> None:
    assert {status for status in Status if status.counts} == {"success", "failure", "max_turns", "task_timeout", "parse_error"}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"kind": "clik", "x": 1, "y": 1}, "there is no action 'clik'"),
        ({"kind": "click"}, "click needs x and y"),
        ({"kind": "drag", "x": 1, "y": 1, "x2": 3}, "drag needs x and y and x2 and y2"),
        ({"kind": "scroll"}, "scroll needs dx or dy"),
        ({"kind": "scroll", "dy": math.inf}, "scroll needs dx or dy"),
        ({"kind": "scroll", "dy": 3, "x": 1}, "scroll needs both x and y, or neither"),
        ({"kind": "type"}, "type needs text"),
        ({"kind": "key"}, "key needs keys"),
        ({"kind": "wait", "seconds": math.nan}, "wait takes 0 to 60 seconds"),
    ],
)
def test_an_action_without_its_values_is_the_policys_error(given: dict[str, object], told: str) -> None:
    with pytest.raises(ActionError, match=told):
        Action(**given)


def test_points_are_on_the_screen_up_to_its_last_pixel() -> None:
    drag = Action(kind="drag", x=0, y=0, x2=95.9, y2=63)
    assert drag.outside((96, 64)) is None and drag.outside((95, 64)) == (95.9, 63)
    assert Action(kind="click", x=math.nan, y=0).outside((96, 96)) is not None
    assert drag.written() == {"kind": "drag", "x": 0, "y": 0, "x2": 95.9, "y2": 63} and Action(**drag.written()) == drag


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"id": "a"', ":2: this is not JSON"),
        ("[1]", ":2: this is list, not an object with the keys id, instruction"),
        ('{"id": "a", "parms": {}}', ":2: parms: there is no such key; did you mean 'params'?"),
        ('{"instruction": "x"}', ":2: id: it is missing"),
        ('{"id": 3}', ":2: id: 3 is not a string"),
        ('{"id": "a", "params": [1]}', ":2: params: [1] is not an object"),
        ('{"id": "a", "max_turns": true}', ":2: max_turns: true is not a whole number"),
        ('{"id": "a", "max_turns": 0}', ":2: max_turns: 0 is too little; it is at least 1"),
        ('{"id": "first"}', ":2: id: 'first' stands on an earlier line already"),
        ('{"id": "refused"}', ":2: evaluator: none"),
    ],
)
def test_task_files_name_file_line_and_key(tmp_path: Path, line: str, told: str) -> None:
    def check(task: Task) -> None:
        if task.id == "refused":
            raise ConfigError("evaluator: none")

    file = tmp_path / "tasks.jsonl"
    file.write_text(f'{{"id": "first"}}\n{line}\n')
    with pytest.raises(ConfigError) as caught:
        read_tasks(file, check)
    assert str(caught.value).startswith(f"{file}{told}")


def test_task_files_of_other_systems_are_read_and_empty_ones_are_not(tmp_path: Path) -> None:
    file = tmp_path / "tasks.jsonl"
    file.write_bytes('\ufeff{"id": "a", "instruction": "öffne\u2028", "seed": 0}\r\n\r\n'.encode())
    assert read_tasks(file) == [Task(id="a", instruction="öffne\u2028", seed=0)]
    file.write_text("\n")
    with pytest.raises(ConfigError, match=r"tasks\.jsonl has no task"):
        read_tasks(file)
    with pytest.raises(ConfigError, match="there is no such task file"):
        read_tasks(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("comparator", "output", "holds"),
    [
        ({"equals": "1"}, " 1\n", True),
        ({"equals": "1"}, "11", False),
        ({"contains": "Wi-Fi"}, "mFocus=Wi-Fi}", True),
        ({"regex": "^vol: [5-9]$"}, "vol: 7", True),
        ({"regex": "^vol: [5-9]$"}, "vol: 4", False),
        ({"at_least": 3, "at_most": 5}, "5.0", True),
        ({"at_least": 3, "at_most": 5}, "6", False),
        ({"at_least": 0}, "null", False),
    ],
)
def test_comparators(comparator: dict[str, object], output: str, holds: bool) -> None:
    async def run(command: str) -> Printed:
        return Printed(output, 1)

    outcome = asyncio.run(validate(parse_validators({"command": "x", **comparator}), run))
    assert (outcome.success, outcome.reward) == (holds, float(holds)) and outcome.details == {"x": output.strip()}


@pytest.mark.parametrize(
    ("evaluator", "told"),
    [
        ({"command": " ", "equals": "1"}, "evaluator.command: it is missing"),
        ({"command": "x", "equals": 1}, "evaluator.equals: 1 is not a string; outputs of commands are strings, so write '1'"),
        ({"command": "x", "regex": "("}, "evaluator.regex: '(' is no regular expression"),
        ({"command": "x", "at_most": "3"}, "evaluator.at_most: '3' is not a number"),
        ({"command": "x", "equal": "3"}, "evaluator.equal: there is no such key; did you mean 'equals'?"),
        ({"all": []}, "evaluator.all: it is a list"),
        ({"all": [{"command": "x", "equals": "1"}, {"command": "y"}]}, "evaluator.all[1]: give one of equals"),
    ],
)
def test_a_validator_that_could_never_say_yes_is_refused(evaluator: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_validators(evaluator)
    assert str(caught.value).startswith(told)


def test_a_command_that_the_machine_does_not_have_is_no_failure_of_the_policy() -> None:
    async def run(command: str) -> Printed:
        return Printed("sh: settings: not found", 127)

    with pytest.raises(WorldError, match="cannot be run .exit code 127.: sh: settings: not found"):
        asyncio.run(validate(parse_validators({"command": "settings get", "equals": "1"}), run))


class Brittle(World):
    """Fails in one call. failing: its name."""

    def __init__(self, failing: str) -> None:
        super().__init__(Limits())
        self.failing = failing

    async def fail(self, call: str) -> None:
        if call == self.failing:
            raise TimeoutError("the socket") if call == "screenshot" else KeyError("gone")

    async def on_reset(self, task: Task, seed: int) -> str:
        await self.fail("reset")
        return "go"

    async def on_screenshot(self) -> Observation:
        await self.fail("screenshot")
        return Observation(text="here")

    async def on_execute(self, action: Action) -> None:
        await self.fail("execute")

    async def on_evaluate(self) -> Outcome:
        await self.fail("evaluate")
        return Outcome(True, 1.0)

    async def on_close(self) -> None:
        await self.fail("close")


class Brittles(Worlds):
    def __init__(self, *failing: str) -> None:
        super().__init__()
        self.failing = list(failing)

    def check(self, task: Task) -> None: ...

    async def on_open(self) -> World:
        failing = self.failing.pop(0)
        if failing == "open":
            raise OSError("no machine is free")
        return Brittle(failing)


async def through(world: World, attempt: int) -> int:
    await world.reset(Task(id="a"), 0)
    assert (await world.screenshot()).text == "here"
    await world.execute(Action(kind="done"))
    assert (await world.evaluate()).success
    return attempt


def test_failures_of_a_world_are_retried_and_never_a_reward() -> None:
    worlds = Brittles("open", "reset", "screenshot", "execute", "evaluate", "close")
    assert asyncio.run(worlds.attempts(through, retries=5)) == 5
    assert worlds.counts == {"opened": 5, "closed": 4, "leaked": 1}
    for call, status, told in [
        ("open", Status.RESET_FAILED, "opening a world failed: OSError: no machine is free"),
        ("reset", Status.RESET_FAILED, "reset failed: KeyError: 'gone'"),
        ("screenshot", Status.ENV_ERROR, "screenshot failed: TimeoutError: the socket"),
        ("evaluate", Status.ENV_ERROR, "evaluate failed: KeyError"),
    ]:
        with pytest.raises(WorldError, match=told) as caught:
            asyncio.run(Brittles(call).attempts(through, retries=0))
        assert caught.value.status is status


def test_limits_leave_time() -> None:
    with pytest.raises(ConfigError, match=r"limits.reset=0 leaves no time"):
        Limits(reset=0)


def test_keys_of_observations_tell_pictures_apart() -> None:
    from PIL import Image

    wide, high = Image.new("RGB", (4, 2)), Image.new("RGB", (2, 4))
    assert len({Observation(wide).key, Observation(high).key, Observation().key, Observation(text="a").key}) == 4
    assert Observation(wide).key == Observation(wide.copy()).key and Observation(wide, state="s").key == "s"
