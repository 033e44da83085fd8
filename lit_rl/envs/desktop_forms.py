"""Programs of the desktop with words: a dialog, a form, a list."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import ClassVar

from lit_rl.envs.actions import Action
from lit_rl.envs.desktop import COLOURS, PANEL, SHADE, Box, Canvas, Program, click_on, inside

WORDS = ("apple", "bird", "cloud", "door", "east", "fern", "gold", "hill", "iron", "jazz", "kite", "lamp", "moon", "north", "oak", "pear")
GREY = (120, 120, 120)


class Dialog(Program):
    """An icon opens a dialog by a double click; a box in it is to be ticked, and OK pressed. Cancel forgets the tick."""

    def __init__(self, draws: Random, size: int, settings: Mapping[str, int]) -> None:
        super().__init__(draws, size, settings)
        self.icon = self.cell(draws.randrange(9), 3)
        self.swapped = draws.random() < 0.5
        self.open = self.ticked = self.saved = False

    @property
    def boxes(self) -> dict[str, Box]:
        """The widgets of the open dialog."""
        left, right = self.share(0.12, 0.62, 0.46, 0.82), self.share(0.54, 0.62, 0.88, 0.82)
        buttons = {"Cancel": left, "OK": right} if self.swapped else {"OK": left, "Cancel": right}
        return {"tick": self.share(0.2, 0.28, 0.4, 0.48), **buttons}

    @property
    def instruction(self) -> str:
        return "open the dialog, tick the box, press OK"

    @property
    def solved(self) -> bool:
        """True once the task is done."""
        return self.saved

    def state(self) -> dict[str, object]:
        """Values for `desktop get`."""
        return {"open": int(self.open), "ticked": int(self.ticked)}

    def paint(self, canvas: Canvas) -> None:
        canvas.box(self.icon, COLOURS["blue"], margin=0.2)
        if not self.open:
            return
        boxes = self.boxes
        canvas.box(self.share(0.06, 0.15, 0.94, 0.9), PANEL, edge=True)
        canvas.box(boxes["tick"], COLOURS["green"] if self.ticked else PANEL, edge=True)
        for name in ("OK", "Cancel"):
            canvas.box(boxes[name], SHADE, edge=True)
            canvas.label(boxes[name], name)

    def click(self, x: float, y: float, *, double: bool = False) -> None:
        if not self.open:
            self.open = double and inside(self.icon, x, y)
            return
        hit = next((name for name, box in self.boxes.items() if inside(box, x, y)), "")
        if hit == "tick":
            self.ticked = not self.ticked
        elif hit:
            self.open, self.saved = False, hit == "OK" and self.ticked
            self.ticked = self.saved

    def oracle(self) -> Action:
        """The next right action."""
        if not self.open:
            return click_on(self.icon, double=True)
        return click_on(self.boxes["OK" if self.ticked else "tick"])


class Form(Program):
    """A word is to be typed into a field, and sent with enter or the button. Sending another word fails."""

    ranges: ClassVar = {"words": (4, 1, len(WORDS))}

    def __init__(self, draws: Random, size: int, settings: Mapping[str, int]) -> None:
        super().__init__(draws, size, settings)
        self.word = draws.choice(WORDS[: settings["words"]])
        self.text, self.focused, self.sent = "", False, False
        top = 0.1 + 0.1 * draws.randrange(3)
        self.field, self.button = self.share(0.08, top, 0.92, top + 0.22), self.share(0.3, top + 0.4, 0.7, top + 0.6)

    @property
    def instruction(self) -> str:
        return f"enter {self.word}"

    @property
    def solved(self) -> bool:
        """True once the task is done."""
        return self.sent and self.text == self.word

    def state(self) -> dict[str, object]:
        """Values for `desktop get`."""
        return {"text": self.text, "focused": int(self.focused), "sent": int(self.sent)}

    def paint(self, canvas: Canvas) -> None:
        canvas.box(self.field, PANEL if self.focused else SHADE, edge=True)
        canvas.label(self.field, self.text)
        canvas.box(self.button, COLOURS["green"], edge=True)
        canvas.label(self.button, "Send")

    def click(self, x: float, y: float, *, double: bool = False) -> None:
        self.focused = inside(self.field, x, y)
        if inside(self.button, x, y):
            self._send()

    def type(self, text: str) -> None:
        if self.focused:
            self.text = (self.text + text.replace("\n", ""))[:12]

    def key(self, keys: tuple[str, ...]) -> None:
        if self.focused and keys == ("backspace",):
            self.text = self.text[:-1]
        elif self.focused and keys == ("enter",):
            self._send()

    def _send(self) -> None:
        self.sent = True
        self.failed = self.text != self.word

    def oracle(self) -> Action:
        """The next right action."""
        if self.text == self.word:
            return click_on(self.button)
        if not self.focused:
            return click_on(self.field)
        if not self.word.startswith(self.text):
            return Action(kind="key", keys=("backspace",))
        return Action(kind="type", text=self.word[len(self.text) :])


class Rows(Program):
    """A list of words, of which four are seen at a time. One is to be found by scrolling, and clicked; another one fails."""

    ranges: ClassVar = {"rows": (8, 4, len(WORDS))}
    SEEN = 4

    def __init__(self, draws: Random, size: int, settings: Mapping[str, int]) -> None:
        super().__init__(draws, size, settings)
        self.words = draws.sample(WORDS, settings["rows"])
        self.wanted = draws.randrange(settings["rows"])
        self.first, self.chosen = 0, ""

    @property
    def instruction(self) -> str:
        return f"choose {self.words[self.wanted]}"

    @property
    def solved(self) -> bool:
        """True once the task is done."""
        return self.chosen == self.words[self.wanted]

    def state(self) -> dict[str, object]:
        """Values for `desktop get`."""
        return {"first": self.first, "chosen": self.chosen}

    def row(self, place: int) -> Box:
        """The box of a row that is seen."""
        return self.share(0, place / self.SEEN, 0.9, (place + 1) / self.SEEN)

    def paint(self, canvas: Canvas) -> None:
        for place, word in enumerate(self.words[self.first : self.first + self.SEEN]):
            canvas.box(self.row(place), PANEL, edge=True)
            canvas.label(self.row(place), word)
        count = len(self.words)
        canvas.box(self.share(0.92, self.first / count, 0.99, (self.first + self.SEEN) / count), GREY)

    def scroll(self, dy: float) -> None:
        rows = round(dy / (self.size / self.SEEN)) or (1 if dy > 0 else -1 if dy < 0 else 0)
        self.first = min(max(self.first + rows, 0), len(self.words) - self.SEEN)

    def click(self, x: float, y: float, *, double: bool = False) -> None:
        for place in range(self.SEEN):
            if inside(self.row(place), x, y):
                self.chosen = self.words[self.first + place]
                self.failed = not self.solved

    def oracle(self) -> Action:
        """The next right action."""
        if self.first <= self.wanted < self.first + self.SEEN:
            return click_on(self.row(self.wanted - self.first))
        return Action(kind="scroll", dy=self.size / 2 if self.wanted > self.first else -self.size / 2)
