"""Dialects of actions: how a prompt asks for them, and how an answer is read.

A codec never guesses: an answer that is not an action of its dialect raises `ActionError` with a sentence for the policy.
"""

from __future__ import annotations

import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping

from lit_rl.agents.screens import Screen, Space, coordinates
from lit_rl.envs.actions import Action, ActionError, Kind

CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)


class Codec(ABC):
    """A dialect of actions.

    Args:
        space: How points are written, see `lit_rl.agents.screens.Space`.
    """

    def __init__(self, space: Space) -> None:
        self.coordinates = coordinates(space)

    @abstractmethod
    def system(self, kinds: Collection[Kind], screen: Screen | None, max_turns: int) -> str:
        """The system message, which tells the actions of the world; empty: the conversation has none. screen: None without pictures."""

    @abstractmethod
    def read(self, text: str, screen: Screen | None) -> Action:
        """The action that an answer asks for, in pixels of the screenshot. Raises ActionError with what is wrong."""

    @abstractmethod
    def write(self, action: Action, screen: Screen | None) -> str:
        """The answer that asks for an action, for demonstrations."""

    # ------------------------------------------------------------------ points
    def _point(self, x: object, y: object, screen: Screen | None) -> tuple[float, float]:
        if screen is None:
            raise ActionError("there is no screen here, so no point on it")
        across, down = self.coordinates.extent(screen)
        if not (is_number(x) and is_number(y)):
            raise ActionError(f"a point has two numbers, not {x!r} and {y!r}")
        assert isinstance(x, int | float) and isinstance(y, int | float)
        if not (0 <= x < across and 0 <= y < down):
            raise ActionError(f"({x:g}, {y:g}) is outside of the screen, whose coordinates are 0 to {across - 1} and 0 to {down - 1}")
        return self.coordinates.pixels(float(x), float(y), screen)

    def _named(self, action: Action, screen: Screen | None) -> list[tuple[int, int]]:
        assert screen is not None or not action.points, "points are on a screen"
        return [self.coordinates.written(point, screen) for point in action.points] if screen is not None else []


class Compact(Codec):
    """One line of words: `click X Y`, `double_click X Y`, `drag X Y X Y`, `scroll DX DY`, `type TEXT`, `key A+B`, `wait S`, `done ANSWER`.

    Args:
        space: How points are written.
        prompt: Tell the policy what there is to say; else it must have learned that, as small models do from demonstrations.
    """

    POINTS: Mapping[str, int] = {"click": 1, "double_click": 1, "right_click": 1, "long_press": 1, "move": 1, "drag": 2}
    TEXTS = ("type", "open", "done")

    def __init__(self, space: Space = "bins:8", prompt: bool = True) -> None:
        super().__init__(space)
        self.prompt = prompt

    def system(self, kinds: Collection[Kind], screen: Screen | None, max_turns: int) -> str:
        if not self.prompt:
            return ""
        forms = {kind: f"{kind} X Y" for kind in self.POINTS} | {kind: f"{kind} TEXT" for kind in self.TEXTS}
        forms |= {"drag": "drag X Y X Y", "scroll": "scroll DX DY", "key": "key A+B", "button": "button NAME", "wait": "wait SECONDS"}
        told = [forms.get(kind, kind) for kind in sorted({*kinds, "done", "fail"})]
        where = ""
        if screen is not None:
            across, down = self.coordinates.extent(screen)
            where = f" X is 0 to {across - 1} from left to right, Y 0 to {down - 1} from top to bottom."
        return f"Say one action in each of at most {max_turns} turns, and nothing else: {'; '.join(told)}.{where}"

    def read(self, text: str, screen: Screen | None) -> Action:
        word, _, rest = text.strip().partition(" ")
        if word in self.POINTS:
            numbers = [parsed_number(part) for part in rest.split()]
            if len(numbers) != 2 * self.POINTS[word]:
                raise ActionError(f"{word} takes {2 * self.POINTS[word]} numbers, not {rest!r}")
            points = [self._point(x, y, screen) for x, y in zip(numbers[::2], numbers[1::2], strict=True)]
            return action_at(word, *points)
        if word in self.TEXTS:
            return Action(kind=kind_of(word), text=rest)
        if word in ("key", "button"):
            return Action(kind=kind_of(word), keys=tuple(filter(None, rest.split("+"))))
        if word == "scroll":
            numbers = [parsed_number(part) for part in rest.split()]
            if len(numbers) != 2 or None in numbers:
                raise ActionError(f"scroll takes two numbers of pixels, not {rest!r}")
            return Action(kind="scroll", dx=float(numbers[0] or 0), dy=float(numbers[1] or 0))
        if word == "wait":
            return Action(kind="wait", seconds=seconds_of(parsed_number(rest)))
        if word == "fail" and not rest:
            return Action(kind="fail")
        raise ActionError(f"{text.strip()[:80]!r} is no action")

    def write(self, action: Action, screen: Screen | None) -> str:
        words: list[object] = [action.kind, *(n for point in self._named(action, screen) for n in point)]
        if action.kind in self.TEXTS:
            words.append(action.text)
        elif action.kind in ("key", "button"):
            words.append("+".join(action.keys))
        elif action.kind == "scroll":
            words = ["scroll", f"{action.dx:g}", f"{action.dy:g}"]
        elif action.kind == "wait":
            words.append(f"{action.seconds:g}")
        return " ".join(str(word) for word in words if word != "")


# ---------------------------------------------------------------------- tool calls
def tool_call(text: str) -> tuple[str, Mapping[str, object]]:
    """Name and arguments of the one tool call of an answer. Raises ActionError for none, several, or what is no JSON object."""
    found = CALL.findall(text)
    if len(found) != 1:
        raise ActionError(f"an answer holds one <tool_call>...</tool_call>, not {len(found)}")
    try:
        call = json.loads(found[0])
    except (ValueError, RecursionError) as error:
        raise ActionError(f"the tool call is not JSON: {error}") from error
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not isinstance(call.get("arguments"), dict):
        raise ActionError('a tool call is {"name": ..., "arguments": {...}}')
    return call["name"], call["arguments"]


def written_call(name: str, **arguments: object) -> str:
    """A tool call as an answer writes it."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}\n</tool_call>"


def action_at(kind: str, first: tuple[float, float], second: tuple[float, float] | None = None) -> Action:
    """The action of this kind at one point, or from one to another."""
    x2, y2 = second or (None, None)
    return Action(kind=kind_of(kind), x=first[0], y=first[1], x2=x2, y2=y2)


def kind_of(word: str) -> Kind:
    """A word as a kind of action."""
    return word  # type: ignore[return-value]  # `Action` looks itself whether there is such a kind


def is_number(value: object) -> bool:
    """True for a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def parsed_number(word: str) -> float | None:
    """A number, or None; Python's own reading would take `1_0`, `nan` and full-width digits."""
    return float(word) if re.fullmatch(r"[+-]?[0-9]{1,6}(\.[0-9]{1,6})?", word) else None


def seconds_of(value: object) -> float:
    """Raises ActionError for what is no number."""
    if not is_number(value):
        raise ActionError(f"wait takes a number of seconds, not {value!r}")
    assert isinstance(value, int | float)
    return float(value)
