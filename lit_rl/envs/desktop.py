"""A desktop of a few hundred lines: programs drawn with PIL, each with an instruction, a state, and an oracle. No time, no threads.

It is the machine behind `lit_rl.envs.tiny_desktop` and behind the fake GBox service of the tests.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from random import Random
from typing import ClassVar

from PIL import Image, ImageDraw, ImageFont

from lit_rl.envs.actions import Action
from lit_rl.envs.tasks import known_keys
from lit_rl.envs.validators import Printed
from lit_rl.errors import ConfigError

Box = tuple[float, float, float, float]
"""Left, top, right, bottom, in pixels."""

COLOURS: Mapping[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 220),
    "yellow": (230, 210, 40),
}
GROUND, PANEL, INK, SHADE = (245, 245, 245), (255, 255, 255), (30, 30, 30), (200, 205, 212)
SIZES = (64, 512)
"""The least and the greatest width of the screen, which is square."""


def inside(box: Box, x: float, y: float) -> bool:
    """The left and upper edges belong to a box, the others do not."""
    return box[0] <= x < box[2] and box[1] <= y < box[3]


def middle(box: Box) -> tuple[float, float]:
    """The point in the middle of a box."""
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def click_on(box: Box, *, double: bool = False) -> Action:
    """A click on the middle of a box."""
    x, y = middle(box)
    return Action(kind="double_click" if double else "click", x=x, y=y)


class Events:
    """Events that a program may heed. By default they have no effect, as on any desktop."""

    def click(self, x: float, y: float, *, double: bool = False) -> None:
        """A click with the left button, or a double click."""

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """The left button is held from `start` to `end`."""

    def scroll(self, dy: float) -> None:
        """The wheel moves the view by `dy` pixels downwards."""

    def type(self, text: str) -> None:
        """Characters are typed."""

    def key(self, keys: tuple[str, ...]) -> None:
        """Keys are pressed together."""


class Program(Events, ABC):
    """A program that runs on the desktop.

    ranges: The whole numbers that a task may set in `params`: the default, the least and the greatest of each.
    """

    ranges: ClassVar[Mapping[str, tuple[int, int, int]]] = {}

    def __init__(self, draws: Random, size: int, settings: Mapping[str, int]) -> None:
        self.draws, self.size, self.settings = draws, size, settings
        self.failed = False

    @property
    @abstractmethod
    def instruction(self) -> str:
        """The words for the policy."""

    @property
    @abstractmethod
    def solved(self) -> bool:
        """True once the task is done."""

    @abstractmethod
    def paint(self, canvas: Canvas) -> None:
        """Draw everything."""

    @abstractmethod
    def oracle(self) -> Action:
        """The next action of one who can do it."""

    def state(self) -> dict[str, object]:
        """Values that `desktop get KEY` tells, beside `solved`."""
        return {}

    def cell(self, place: int, grid: int) -> Box:
        """The box of a place of a square grid, rows first."""
        side = self.size / grid
        left, top = place % grid * side, place // grid * side
        return left, top, left + side, top + side

    def share(self, left: float, top: float, right: float, bottom: float) -> Box:
        """A box in shares of the screen."""
        return left * self.size, top * self.size, right * self.size, bottom * self.size


class Canvas:
    """A picture of the screen under way."""

    def __init__(self, size: int) -> None:
        self.picture = Image.new("RGB", (size, size), GROUND)
        self.pen = ImageDraw.Draw(self.picture)
        self.font = ImageFont.load_default(max(8, size // 10))

    def box(self, box: Box, fill: tuple[int, int, int], *, margin: float = 0.0, edge: bool = False) -> None:
        """Fill a box up to `margin`, a share of its width, from its edges."""
        gap = margin * (box[2] - box[0])
        corners = (round(box[0] + gap), round(box[1] + gap), round(box[2] - gap) - 1, round(box[3] - gap) - 1)
        self.pen.rectangle(corners, fill=fill, outline=INK if edge else None)

    def label(self, box: Box, text: str, *, fill: tuple[int, int, int] = INK) -> None:
        """Write in the middle of a box."""
        self.pen.text(middle(box), text, fill=fill, font=self.font, anchor="mm")


class Desktop:
    """A program on a screen of `size` x `size` pixels, and what the outside can do to it.

    Two desktops of the same program, settings and seed look the same after the same actions, pixel by pixel.
    """

    def __init__(self, program: type[Program], settings: Mapping[str, int], *, size: int, seed: int) -> None:
        self.program = program(Random(f"{program.__name__} {seed}"), size, settings)
        self.size = size

    @property
    def over(self) -> bool:
        """True once the program takes no more input: it is solved, or can no longer be."""
        return self.program.solved or self.program.failed

    def picture(self) -> Image.Image:
        """The screen as it is now."""
        canvas = Canvas(self.size)
        self.program.paint(canvas)
        return canvas.picture

    def state(self) -> dict[str, object]:
        """The values that `desktop get KEY` tells."""
        return {"solved": int(self.program.solved), **self.program.state()}

    def act(self, action: Action) -> None:
        """Carry out an action; points are on the screen."""
        program, points = self.program, action.points
        if self.over:
            return
        match action.kind:
            case "click" | "double_click":
                program.click(*points[0], double=action.kind == "double_click")
            case "drag":
                program.drag(*points)
            case "scroll":
                program.scroll(action.dy)
            case "type":
                program.type(action.text)
            case "key":
                program.key(action.keys)
            case _:
                pass  # nothing here heeds the pointer, the right button, or time

    def command(self, line: str) -> Printed:
        """`desktop get KEY` prints a value of the state, as a shell on the machine would."""
        words = line.split()
        if words[:1] != ["desktop"]:
            return Printed(f"sh: {words[0] if words else ''}: not found\n", 127)
        if words[1:2] != ["get"] or len(words) != 3 or words[2] not in (state := self.state()):
            return Printed(f"usage: desktop get KEY, with KEY one of {', '.join(sorted(self.state()))}\n", 2)
        return Printed(f"{state[words[2]]}\n", 0)


def checked_settings(program: type[Program], params: Mapping[str, object], where: str = "params.") -> dict[str, int]:
    """The program's settings: its defaults, and what a task sets. Raises ConfigError, beginning with the key."""
    known_keys(params, tuple(program.ranges), where)
    settings = {name: default for name, (default, _, _) in program.ranges.items()}
    for name, value in params.items():
        _, least, most = program.ranges[name]
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ConfigError(f"{where}{name}: {value!r} is not a whole number from {least} to {most}")
        settings[name] = value
    return settings
