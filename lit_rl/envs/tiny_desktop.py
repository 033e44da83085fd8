"""The tiny desktop: a world without installation, deterministic, in process, some hundred episodes a second."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from lit_rl.envs.actions import Action, Kind
from lit_rl.envs.base import Observation, Outcome, World, Worlds
from lit_rl.envs.desktop import SIZES, Desktop, Program, checked_settings
from lit_rl.envs.desktop_forms import Dialog, Form, Rows
from lit_rl.envs.desktop_pointing import Buttons, Drag, Order
from lit_rl.envs.failures import Limits
from lit_rl.envs.tasks import Task
from lit_rl.envs.validators import Printed, Validator, parse_validators, validate
from lit_rl.errors import ConfigError

PROGRAMS: Mapping[str, type[Program]] = {
    "buttons": Buttons,
    "order": Order,
    "dialog": Dialog,
    "form": Form,
    "list": Rows,
    "drag": Drag,
}
"""Programs by the name that a task gives in `params.program`."""

DESKTOP_KINDS: frozenset[Kind] = frozenset(
    ("click", "double_click", "right_click", "move", "drag", "scroll", "type", "key", "wait"),
)


class Plan(NamedTuple):
    """A task as the desktop is to run it."""

    program: type[Program]
    settings: Mapping[str, int]
    size: int

    def desktop(self, seed: int) -> Desktop:
        """The desktop as it is at the start."""
        return Desktop(self.program, self.settings, size=self.size, seed=seed)


def plan(params: Mapping[str, object], size: int) -> Plan:
    """The program of a task's params, its settings, and the width of the screen. Raises ConfigError, beginning with the key."""
    name = params.get("program")
    if not isinstance(name, str) or name not in PROGRAMS:
        raise ConfigError(f"params.program: {name!r} is no program of the desktop; there are {', '.join(PROGRAMS)}")
    own = {key: value for key, value in params.items() if key != "program"}
    return Plan(PROGRAMS[name], checked_settings(PROGRAMS[name], own), size)


class TinyDesktop(World):
    """One desktop. See `TinyDesktops`."""

    kinds = DESKTOP_KINDS

    def __init__(self, size: int, limits: Limits) -> None:
        super().__init__(limits)
        self.size = size
        self.validators: list[Validator] = []
        self.desktop: Desktop | None = None

    @property
    def running(self) -> Desktop:
        """The desktop, once the world was reset."""
        if self.desktop is None:
            raise RuntimeError("reset comes first")
        return self.desktop

    async def on_reset(self, task: Task, seed: int) -> str:
        self.validators = parse_validators(task.evaluator)
        self.desktop = plan(task.params, self.size).desktop(seed)
        return task.instruction or self.desktop.program.instruction

    async def on_screenshot(self) -> Observation:
        return Observation(self.running.picture(), ended=self.running.over)

    async def on_execute(self, action: Action) -> None:
        self.running.act(action)

    async def on_evaluate(self) -> Outcome:
        async def run(command: str) -> Printed:
            return self.running.command(command)

        return await validate(self.validators, run)

    def oracle(self) -> Action:
        """The next action of one who can do the task, for demonstrations; `done` once it is done."""
        return Action(kind="done") if self.running.over else self.running.program.oracle()


class TinyDesktops(Worlds):
    """Desktops drawn with PIL, on which a task's `params.program` runs: buttons, order, dialog, form, list or drag.

    A task's `params` have the program's own settings beside it; its evaluator is a command, `desktop get KEY`, and a comparator, such as
    {"command": "desktop get solved", "equals": "1"}. An action where nothing is has no effect. The same task and seed give the same pixels.

    Args:
        size: Width and height of the screen in pixels, 64 to 512.
        limits: Seconds that each call to a world may take.
    """

    kinds = DESKTOP_KINDS

    def __init__(self, *, size: int = 96, limits: Limits | None = None) -> None:
        super().__init__(limits)
        if not SIZES[0] <= size <= SIZES[1]:
            raise ConfigError(f"size={size} of the desktop is not from {SIZES[0]} to {SIZES[1]} pixels")
        self.size = size

    def check(self, task: Task) -> None:
        desktop = plan(task.params, self.size).desktop(0)
        for validator in parse_validators(task.evaluator):
            if (printed := desktop.command(validator.command)).code:
                raise ConfigError(f"evaluator.command: {validator.command!r} is no command of the desktop: {printed.output.strip()}")

    async def on_open(self) -> TinyDesktop:
        return TinyDesktop(self.size, self.limits)
