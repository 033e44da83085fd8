"""Programs of the desktop that want the pointer at the right place, several times: buttons, order, drag."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from random import Random
from typing import ClassVar

from lit_rl.envs.actions import Action
from lit_rl.envs.desktop import COLOURS, PANEL, Box, Canvas, Program, click_on, inside, middle

MARGINS = range(1, 9)
"""Distances of a button's edges from those of its cell, in 32nds of the cell: every button covers the middle of its cell."""
SHAPES = len(MARGINS) ** 4
"""Different shapes of a button."""


@cache
def shape_numbers() -> list[int]:
    """The shapes in their order, which is a random one, so that neighbours do not look alike."""
    return Random("shapes").sample(range(SHAPES), SHAPES)


def shaped(cell: Box, number: int) -> Box:
    """A part of a cell: the shape with this number, 0 to `SHAPES` - 1. They all differ on cells of 32 pixels or more."""
    rest, margins = shape_numbers()[number], []
    for _ in range(4):
        rest, digit = divmod(rest, len(MARGINS))
        margins.append(MARGINS[digit] * (cell[2] - cell[0]) / 32)
    return cell[0] + margins[0], cell[1] + margins[1], cell[2] - margins[2], cell[3] - margins[3]


class Buttons(Program):
    """A coloured button jumps to another place after each hit. `others` more buttons of other colours stand about and are not meant.

    With `shapes` = n > 0 a button has one of n shapes, those with the numbers from `first_shape` on, and another after each hit: tasks
    whose shapes differ have no screen in common.
    """

    ranges: ClassVar = {
        "hits": (2, 1, 10),
        "grid": (3, 2, 8),
        "others": (0, 0, 3),
        "shapes": (0, 0, SHAPES // 2),
        "first_shape": (0, 0, SHAPES // 2),
    }

    def __init__(self, draws: Random, size: int, settings: Mapping[str, int]) -> None:
        super().__init__(draws, size, settings)
        self.colours = draws.sample(sorted(COLOURS), 1 + settings["others"])
        self.hits = self.misses = 0
        self.places = draws.sample(range(settings["grid"] ** 2), len(self.colours))
        self.shapes = [self.shape() for _ in self.colours]

    @property
    def instruction(self) -> str:
        return f"click {self.colours[0]}"

    def shape(self) -> int | None:
        """The number of a shape that this task allows; None for the one of a task without shapes."""
        first, count = self.settings["first_shape"], self.settings["shapes"]
        return self.draws.randrange(first, first + count) if count else None

    def button(self, n: int) -> Box:
        """The box of a button, 0 being the one that is meant."""
        cell, shape = self.cell(self.places[n], self.settings["grid"]), self.shapes[n]
        margin = 0.12 * (cell[2] - cell[0])
        return shaped(cell, shape) if shape is not None else (cell[0] + margin, cell[1] + margin, cell[2] - margin, cell[3] - margin)

    @property
    def solved(self) -> bool:
        """True once the task is done."""
        return self.hits >= self.settings["hits"]

    def state(self) -> dict[str, object]:
        """Values for `desktop get`."""
        return {"hits": self.hits, "misses": self.misses}

    def paint(self, canvas: Canvas) -> None:
        for n, colour in enumerate(self.colours):
            canvas.box(self.button(n), COLOURS[colour])

    def click(self, x: float, y: float, *, double: bool = False) -> None:
        if not inside(self.button(0), x, y):
            self.misses += 1
            return
        self.hits += 1
        free = [place for place in range(self.settings["grid"] ** 2) if place not in self.places]
        self.places[0] = self.draws.choice(free or [self.places[0]])
        self.shapes[0] = self.shape()

    def oracle(self) -> Action:
        """The next right action."""
        return click_on(self.button(0))


class Order(Program):
    """Coloured squares that are to be clicked in the order of the instruction. A wrong one begins anew."""

    ranges: ClassVar = {"count": (2, 2, 4), "grid": (3, 2, 8)}

    def __init__(self, draws: Random, size: int, settings: Mapping[str, int]) -> None:
        super().__init__(draws, size, settings)
        self.colours = draws.sample(sorted(COLOURS), settings["count"])
        self.places = draws.sample(range(settings["grid"] ** 2), settings["count"])
        self.done = 0

    @property
    def instruction(self) -> str:
        return "click " + " then ".join(self.colours)

    @property
    def solved(self) -> bool:
        """True once the task is done."""
        return self.done == len(self.colours)

    def state(self) -> dict[str, object]:
        """Values for `desktop get`."""
        return {"done": self.done}

    def paint(self, canvas: Canvas) -> None:
        for number, (colour, place) in enumerate(zip(self.colours, self.places, strict=True)):
            canvas.box(self.cell(place, self.settings["grid"]), COLOURS[colour], margin=0.12, edge=number < self.done)

    def click(self, x: float, y: float, *, double: bool = False) -> None:
        hit = next((n for n, place in enumerate(self.places) if inside(self.cell(place, self.settings["grid"]), x, y)), None)
        if hit is not None:
            self.done = self.done + 1 if hit == self.done else int(hit == 0)

    def oracle(self) -> Action:
        """The next right action."""
        return click_on(self.cell(self.places[self.done], self.settings["grid"]))


class Drag(Program):
    """Coloured squares are to be dragged, one after the other, onto the frame. A square that is let go elsewhere stays where it was."""

    ranges: ClassVar = {"squares": (2, 1, 3), "grid": (3, 2, 6)}

    def __init__(self, draws: Random, size: int, settings: Mapping[str, int]) -> None:
        super().__init__(draws, size, settings)
        *places, self.frame = draws.sample(range(settings["grid"] ** 2), settings["squares"] + 1)
        self.squares = dict(zip(draws.sample(sorted(COLOURS), len(places)), places, strict=True))

    @property
    def instruction(self) -> str:
        return "drag each square onto the frame"

    @property
    def solved(self) -> bool:
        """True once the task is done."""
        return not self.squares

    def state(self) -> dict[str, object]:
        """Values for `desktop get`."""
        return {"left": len(self.squares)}

    def paint(self, canvas: Canvas) -> None:
        canvas.box(self.cell(self.frame, self.settings["grid"]), PANEL, margin=0.05, edge=True)
        for colour, place in self.squares.items():
            canvas.box(self.cell(place, self.settings["grid"]), COLOURS[colour], margin=0.15)

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        grid = self.settings["grid"]
        held = next((colour for colour, place in self.squares.items() if inside(self.cell(place, grid), *start)), None)
        if held and inside(self.cell(self.frame, grid), *end):
            del self.squares[held]

    def oracle(self) -> Action:
        """The next right action."""
        grid = self.settings["grid"]
        (x, y), (x2, y2) = middle(self.cell(next(iter(self.squares.values())), grid)), middle(self.cell(self.frame, grid))
        return Action(kind="drag", x=x, y=y, x2=x2, y2=y2)
