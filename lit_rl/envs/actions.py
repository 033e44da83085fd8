"""Actions that worlds take, in pixels of the screenshot that was shown. How a model writes them down is a codec's business."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal, get_args

from lit_rl.errors import listed

Kind = Literal[
    "click",
    "double_click",
    "right_click",
    "long_press",
    "move",
    "drag",
    "scroll",
    "type",
    "key",
    "button",
    "open",
    "wait",
    "done",
    "fail",
]
"""Names of actions. `done` and `fail` end an episode: the policy says that it has finished, or that it gives up."""

KINDS: tuple[Kind, ...] = get_args(Kind)
MAX_WAIT = 60.0
"""Seconds that one `wait` may take."""


class ActionError(ValueError):
    """An action that cannot be carried out: the policy's fault. The sentence is shown to the policy, and the episode goes on."""


@dataclass(frozen=True, kw_only=True)
class Action:
    """One action. Points are pixels of the screenshot, (0, 0) at the top left; they need not be whole.

    kind: See `Kind`. x, y: Where a click, double click, right click, long press or move goes, where a drag begins, and over what a scroll
    turns (unset: the middle of the screen). x2, y2: The end of a drag. text: What `type` types, the app or address that `open` opens, and
    the answer of `done`. keys: Names that `key` presses together, as browsers name them in small letters (`enter`, `control`, `a`,
    `arrowdown`), or the device's button (`back`, `home`, `menu`). dx, dy: Pixels that `scroll` moves the contents' window by: a positive
    `dy` shows what is further down. seconds: Length of a `wait`. target: Words for what is meant, in place of `x` and `y`, in worlds where
    a second model finds the point (`World.grounds`).

    Raises ActionError for an unknown kind, and for a kind that lacks its values.
    """

    kind: Kind
    x: float | None = None
    y: float | None = None
    x2: float | None = None
    y2: float | None = None
    text: str = ""
    keys: tuple[str, ...] = ()
    dx: float = 0.0
    dy: float = 0.0
    seconds: float = 1.0
    target: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ActionError(f"there is no action {self.kind!r}; there are {listed(KINDS, shown=len(KINDS))}")
        for name in () if self.target and NEEDS.get(self.kind) == POINT else NEEDS.get(self.kind, ()):
            if getattr(self, name) in (None, (), ""):
                raise ActionError(f"{self.kind} needs {' and '.join(NEEDS[self.kind])}")
        if self.kind == "scroll" and not (math.isfinite(self.dx + self.dy) and (self.dx or self.dy)):
            raise ActionError("scroll needs dx or dy, in pixels")
        if (self.x is None) != (self.y is None):
            raise ActionError(f"{self.kind} needs both x and y, or neither")
        if self.kind == "wait" and not 0 <= self.seconds <= MAX_WAIT:
            raise ActionError(f"wait takes 0 to {MAX_WAIT:g} seconds, not {self.seconds:g}")

    @property
    def points(self) -> tuple[tuple[float, float], ...]:
        """The one or two points that this action names, in order."""
        pairs = ((self.x, self.y), (self.x2, self.y2))
        return tuple((x, y) for x, y in pairs if x is not None and y is not None)

    def outside(self, size: tuple[int, int]) -> tuple[float, float] | None:
        """The first point that is not on a screen of `size` (width, height), or is not finite; None where all are on it."""
        return next((p for p in self.points if not (0 <= p[0] < size[0] and 0 <= p[1] < size[1])), None)

    def written(self) -> dict[str, object]:
        """Only what differs from the defaults, for logs and records: `Action(**written)` is the same action."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}


POINT = ("x", "y")
NEEDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("click", "double_click", "right_click", "long_press", "move"), POINT),
    "drag": (*POINT, "x2", "y2"),
    "type": ("text",),
    "key": ("keys",),
    "button": ("keys",),
    "open": ("text",),
}
"""Values without which a kind of action says nothing."""
