"""The tiny desktop: the contract, its programs, its task files."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping

import pytest
from contract import WorldContract

from lit_rl.demo.desktop import OTHER_SHAPES
from lit_rl.envs.actions import Action
from lit_rl.envs.base import Outcome
from lit_rl.envs.desktop import Desktop, checked_settings, click_on
from lit_rl.envs.tasks import Task, read_tasks
from lit_rl.envs.tiny_desktop import PROGRAMS, TinyDesktops
from lit_rl.errors import ConfigError

SOLVED = {"command": "desktop get solved", "equals": "1"}


def task(program: str, evaluator: Mapping[str, object] = SOLVED, **settings: int) -> Task:
    return Task(id=program, params={"program": program, **settings}, evaluator=evaluator)


class TestDesktopContract(WorldContract):
    task = task("form")

    def make(self) -> TinyDesktops:
        return TinyDesktops()


def desktop(program: str, seed: int = 0, size: int = 96, **settings: int) -> Desktop:
    return Desktop(PROGRAMS[program], checked_settings(PROGRAMS[program], settings), size=size, seed=seed)


def play(machine: Desktop, turns: int = 30) -> int:
    """Actions of the oracle until the program is over."""
    for turn in range(turns):
        if machine.over:
            return turn
        machine.act(machine.program.oracle())
    return turns


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("size", [64, 200])
def test_the_oracle_solves_every_program_at_every_setting(program: str, size: int) -> None:
    ranges = PROGRAMS[program].ranges
    for place in range(3):  # default, least, greatest
        for seed in range(5):
            machine = desktop(program, seed, size, **{name: of[place] for name, of in ranges.items()})
            assert machine.picture().size == (size, size) and not machine.over
            assert play(machine) <= 25 and machine.program.solved and machine.command("desktop get solved") == ("1\n", 0)


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_same_seed_and_actions_give_the_same_pixels_and_every_action_shows(program: str) -> None:
    one, other = desktop(program, 3), desktop(program, 3)
    seen = set()
    while not one.over:
        assert one.picture().tobytes() == other.picture().tobytes() and one.program.instruction == other.program.instruction
        seen.add(one.picture().tobytes())
        one.act(one.program.oracle())
        other.act(other.program.oracle())
    assert len(seen) >= 2


def test_what_is_wrong_costs_a_turn_or_fails() -> None:
    def after(machine: Desktop, *actions: Action) -> dict[str, object]:
        for action in actions:
            machine.act(action)
        return machine.state()

    key, click = (lambda name: Action(kind="key", keys=(name,))), (lambda box: Action(kind="click", x=box[0] + 3, y=box[1] + 3))
    machine = desktop("buttons", others=1)
    program = machine.program
    assert after(machine, click(program.cell(program.places[1], 3))) == {"solved": 0, "hits": 0, "misses": 1}
    machine = desktop("order")
    program = machine.program
    assert after(machine, program.oracle(), click(program.cell(program.places[0], 3)))["done"] == 1
    machine = desktop("form")
    program = machine.program
    assert after(machine, Action(kind="type", text=program.word))["text"] == ""  # the field has no focus
    assert after(machine, click(program.field), Action(kind="type", text="no"), key("backspace"))["text"] == "n"
    assert program.oracle() == (key("backspace") if not program.word.startswith("n") else program.oracle())
    assert after(machine, key("enter"))["sent"] == 1 and machine.over and not program.solved
    machine = desktop("list")
    program = machine.program
    assert after(machine, click(program.row(0)))["solved"] == int(program.wanted == 0) and machine.over
    machine = desktop("dialog")
    program = machine.program
    assert after(machine, click(program.icon))["open"] == 0  # a single click does not open it
    assert after(machine, program.oracle(), program.oracle(), click(program.boxes["Cancel"])) == {"solved": 0, "open": 0, "ticked": 0}
    machine = desktop("drag")
    program = machine.program
    missed = Action(kind="drag", x=program.oracle().x, y=program.oracle().y, x2=0, y2=0)
    assert after(machine, missed)["left"] == (2 if program.frame else 1)


def test_an_evaluator_reads_the_state_and_can_ask_for_less_than_solved() -> None:
    once = {"all": [{"command": "desktop get hits", "at_least": 1}, {"command": "desktop get misses", "at_most": 0}]}

    async def run(*actions: int) -> Outcome:
        async with TinyDesktops().world() as world:
            await world.reset(task("buttons", once), 5)
            for miss in actions:
                oracle = world.oracle()
                await world.execute(oracle if not miss else Action(kind="click", x=(oracle.x + 32) % 96, y=oracle.y))
            return await world.evaluate()

    assert asyncio.run(run(0)).success and not asyncio.run(run()).success
    assert asyncio.run(run(1, 0)).details == {"desktop get hits": "1", "desktop get misses": "1"}
    assert not asyncio.run(run(1, 0)).success


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (task("button"), "params.program: 'button' is no program of the desktop; there are buttons, order"),
        (task("buttons", hit=3), "params.hit: there is no such key; did you mean 'hits'?"),
        (task("buttons", hits=0), "params.hits: 0 is not a whole number from 1 to 10"),
        (task("buttons", {}), "evaluator.command: it is missing"),
        (task("buttons", {"command": "desktop get solved"}), "evaluator: give one of equals, contains, regex, at_least, at_most"),
        (task("buttons", {"command": "desktop get text", "equals": "1"}), "usage: desktop get KEY, with KEY one of hits, misses, solved"),
        (task("buttons", {"command": "ls", "equals": "1"}), "'ls' is no command of the desktop: sh: ls: not found"),
        (task("dialog", hits=1), "params.hits: there is no such key; there is none"),
    ],
)
def test_a_task_that_the_desktop_cannot_set_is_refused_with_the_key(given: Task, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TinyDesktops().check(given)
    assert told in str(caught.value)


def test_the_shipped_tasks_are_sound_solvable_in_their_turns_and_held_out() -> None:
    for name in ("buttons", "tiny_desktop"):
        worlds = TinyDesktops()
        train, held_out = (read_tasks(f"configs/agent/tasks/{name}_{split}.jsonl", worlds.check) for split in ("train", "eval"))
        assert not {task.id for task in train} & {task.id for task in held_out}
        assert all(task.seed is None for task in train) and len({task.seed for task in held_out}) == len(held_out)
        for given in [*train, *held_out]:
            settings = {key: value for key, value in given.params.items() if key != "program"}
            assert play(desktop(str(given.params["program"]), given.seed or 0, **settings)) <= given.max_turns


def test_held_out_buttons_have_screens_that_neither_training_nor_the_end_of_fine_tuning_sees() -> None:
    """Every shape in every place, on the screen of the miniature that learns there; a click on the middle of the cell is a hit."""

    def screens(first: int, count: int) -> set[bytes]:
        found = set()
        for place, shape in itertools.product(range(9), range(first, first + count)):
            machine = desktop("buttons", shapes=count, first_shape=first)
            machine.program.places, machine.program.shapes = [place], [shape]
            found.add(machine.picture().tobytes())
            machine.act(click_on(machine.program.cell(place, 3)))
            assert machine.program.hits == 1 and first <= machine.program.shapes[0] < first + count
        return found

    tasks = [read_tasks(f"configs/agent/tasks/buttons_{split}.jsonl") for split in ("train", "eval")]
    [(first, count)], [held_out] = ({(t.params.get("first_shape", 0), t.params["shapes"]) for t in of} for of in tasks)
    seen = [screens(first, count), screens(OTHER_SHAPES, count), screens(*held_out)]
    assert [len(some) for some in seen] == [9 * count, 9 * count, 9 * held_out[1]]
    assert len(set.union(*seen)) == sum(map(len, seen))


def test_the_size_of_the_screen_has_bounds() -> None:
    with pytest.raises(ConfigError, match="size=20 of the desktop is not from 64 to 512"):
        TinyDesktops(size=20)
