"""Dialects of tool calls: Qwen's computer use, and GBox's three tools with targets in words."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping

from lit_rl.agents.codecs import Codec, action_at, is_number, seconds_of, tool_call, written_call
from lit_rl.agents.screens import Screen, Space
from lit_rl.envs.actions import Action, ActionError, Kind

QWEN: Mapping[str, Kind] = {
    "left_click": "click",
    "double_click": "double_click",
    "right_click": "right_click",
    "long_press": "long_press",
    "mouse_move": "move",
    "left_click_drag": "drag",
    "scroll": "scroll",
    "type": "type",
    "key": "key",
    "system_button": "button",
    "open": "open",
    "wait": "wait",
    "terminate": "done",
}
"""Names of Qwen's computer and mobile use, and the actions that they are."""

AS_TOOL = (
    "# Tools\n\nYou may call the function below to act on the screen. Call it once in each answer:\n<tool_call>\n"
    '{{"name": "computer_use", "arguments": {{"action": ..., ...}}}}\n</tool_call>\n\n<tools>\n{tool}\n</tools>'
)


class QwenComputerUse(Codec):
    """`<tool_call>{"name": "computer_use", "arguments": {"action": "left_click", "coordinate": [x, y]}}</tool_call>`, as Qwen-VL writes it.

    Args:
        space: How points are written: `norm1000` for Qwen3-VL, `resized` for Qwen2.5-VL.
    """

    def __init__(self, space: Space = "norm1000") -> None:
        super().__init__(space)

    def system(self, kinds: Collection[Kind], screen: Screen | None, max_turns: int) -> str:
        names = [name for name, kind in QWEN.items() if kind in {*kinds, "done"}]
        across, down = self.coordinates.extent(screen) if screen is not None else (0, 0)
        properties: dict[str, object] = {
            "action": {"type": "string", "enum": names},
            "coordinate": {"type": "array", "description": f"[x, y] of a point; x is 0 to {across - 1}, y is 0 to {down - 1}"},
            "coordinate2": {"type": "array", "description": "[x, y] where a drag ends"},
            "text": {"type": "string", "description": "for type, open, and the answer of terminate"},
            "keys": {"type": "array", "description": "for key: pressed together"},
            "button": {"type": "string", "description": "for system_button: back, home or menu"},
            "pixels": {"type": "number", "description": "for scroll: above 0 is up"},
            "time": {"type": "number", "description": "for wait: seconds"},
            "status": {"type": "string", "enum": ["success", "failure"], "description": "for terminate"},
        }
        parameters = {"type": "object", "properties": properties, "required": ["action"]}
        described = f"Act on the screen with mouse and keyboard, in at most {max_turns} turns. A screenshot follows each action."
        tool = {"type": "function", "function": {"name": "computer_use", "description": described, "parameters": parameters}}
        return AS_TOOL.format(tool=json.dumps(tool))

    def read(self, text: str, screen: Screen | None) -> Action:
        name, given = tool_call(text)
        if name not in ("computer_use", "mobile_use"):
            raise ActionError(f"there is no tool {name!r}; there is computer_use")
        word = given.get("action")
        if not isinstance(word, str) or word not in QWEN:
            raise ActionError(f"computer_use has no action {word!r}; there are {', '.join(QWEN)}")
        kind = QWEN[word]
        if kind == "done":
            return Action(kind="fail") if given.get("status") == "failure" else Action(kind="done", text=_text(given, "text"))
        if kind in ("key", "button"):
            return Action(kind=kind, keys=_keys(given.get("keys", given.get("button"))))
        if kind == "wait":
            return Action(kind="wait", seconds=seconds_of(given.get("time", 1.0)))
        if kind == "scroll":
            pixels = given.get("pixels")
            if not is_number(pixels):
                raise ActionError(f"scroll takes a number of pixels, not {pixels!r}")
            assert isinstance(pixels, int | float)
            x, y = self._point(*_pair(given["coordinate"]), screen) if "coordinate" in given else (None, None)
            return Action(kind="scroll", dy=-float(pixels), x=x, y=y)
        if kind in ("type", "open"):
            return Action(kind=kind, text=_text(given, "text"))
        first = self._point(*_pair(given.get("coordinate")), screen)
        return action_at(kind, first, self._point(*_pair(given.get("coordinate2")), screen) if kind == "drag" else None)

    def write(self, action: Action, screen: Screen | None) -> str:
        arguments: dict[str, object] = {"action": next((name for name, kind in QWEN.items() if kind == action.kind), "terminate")}
        points = self._named(action, screen)
        arguments |= dict(zip(("coordinate", "coordinate2"), map(list, points)))
        if action.kind in ("done", "fail"):
            arguments["status"] = "success" if action.kind == "done" else "failure"
        if action.text:
            arguments["text"] = action.text
        if action.kind in ("key", "button"):
            arguments |= {"keys": list(action.keys)} if action.kind == "key" else {"button": action.keys[0]}
        if action.kind == "scroll":
            arguments["pixels"] = _plain(-action.dy)
        if action.kind == "wait":
            arguments["time"] = _plain(action.seconds)
        return written_call("computer_use", **arguments)


class GBoxTools(Codec):
    """The three tools of GBox's agents: `perform_action` with a target in words, `sleep`, and `report_task_complete`.

    The target is an object such as {"element": "button", "label": "Wi-Fi", "color": "blue"}; worlds with a grounding model find it. A model
    that gives points writes {"x": ..., "y": ...} in its place.

    Args:
        space: How points are written, where they are.
    """

    TYPES: Mapping[str, Kind] = {
        "click": "click",
        "swipe": "drag",
        "scroll": "scroll",
        "input": "type",
        "key_press": "key",
        "button_press": "button",
    }
    OPTIONS: Mapping[str, Kind] = {"left": "click", "right": "right_click", "double": "double_click"}
    DIRECTIONS: Mapping[str, tuple[int, int]] = {"up": (0, -1), "down": (0, 1), "left": (-1, 0), "right": (1, 0)}

    def __init__(self, space: Space = "pixels") -> None:
        super().__init__(space)

    def system(self, kinds: Collection[Kind], screen: Screen | None, max_turns: int) -> str:
        types = [name for name, kind in self.TYPES.items() if kind in kinds]
        return (
            f"You do a task on a screen, one tool call in each of at most {max_turns} turns, inside <tool_call></tool_call> as JSON with "
            f"name and arguments.\nperform_action: action_type ({', '.join(types)}); for click: option (left, right, double) and target; "
            "for swipe: start_target and end_target, or direction and distance; for scroll: direction and distance; for input: text; for "
            "key_press: keys; for button_press: button (back, home, menu). A target describes what is meant: element, label, color, size, "
            "location, shape.\nsleep: duration in seconds.\nreport_task_complete: success and result_message, once the task is done."
        )

    def read(self, text: str, screen: Screen | None) -> Action:
        name, given = tool_call(text)
        if name == "sleep":
            return Action(kind="wait", seconds=seconds_of(given.get("duration")))
        if name == "report_task_complete":
            return Action(kind="done", text=_text(given, "result_message")) if given.get("success", True) is True else Action(kind="fail")
        if name != "perform_action":
            raise ActionError(f"there is no tool {name!r}; there are perform_action, sleep and report_task_complete")
        word = given.get("action_type")
        if not isinstance(word, str) or word not in self.TYPES:
            raise ActionError(f"perform_action has no action_type {word!r}; there are {', '.join(self.TYPES)}")
        kind = self.TYPES[word]
        if kind == "click":
            option = given.get("option", "left")
            if not isinstance(option, str) or option not in self.OPTIONS:
                raise ActionError(f"a click has no option {option!r}; there are {', '.join(self.OPTIONS)}")
            return self._at(self.OPTIONS[option], given.get("target"), screen)
        if kind == "type":
            return Action(kind="type", text=_text(given, "text"))
        if kind in ("key", "button"):
            return Action(kind=kind, keys=_keys(given.get("keys", given.get("button"))))
        if kind == "drag" and "direction" not in given:
            ends = [given.get(key) for key in ("start_target", "end_target")]
            (x, y), (x2, y2) = ((self._point(*_pair(end), screen)) for end in ends)
            return Action(kind="drag", x=x, y=y, x2=x2, y2=y2)
        return self._moved(given, swipe=kind == "drag")

    def _at(self, kind: Kind, target: object, screen: Screen | None) -> Action:
        if isinstance(target, Mapping) and {"x", "y"} <= target.keys():
            return action_at(kind, self._point(target["x"], target["y"], screen))
        words = ", ".join(f"{key}: {value}" for key, value in target.items()) if isinstance(target, Mapping) else target
        if not isinstance(words, str) or not words.strip():
            raise ActionError(f"a click needs a target that says what is meant, not {target!r}")
        return Action(kind=kind, target=words)

    def _moved(self, given: Mapping[str, object], *, swipe: bool) -> Action:
        """Scrolling down and swiping up both show what is further down."""
        direction, distance = given.get("direction"), given.get("distance", 300)
        if not isinstance(direction, str) or direction not in self.DIRECTIONS:
            raise ActionError(f"there is no direction {direction!r}; there are {', '.join(self.DIRECTIONS)}")
        if not is_number(distance):
            raise ActionError(f"distance is a number of pixels, not {distance!r}")
        assert isinstance(distance, int | float)
        dx, dy = (side * float(distance) * (-1 if swipe else 1) for side in self.DIRECTIONS[direction])
        return Action(kind="scroll", dx=dx, dy=dy)

    def write(self, action: Action, screen: Screen | None) -> str:
        if action.kind in ("done", "fail"):
            return written_call("report_task_complete", success=action.kind == "done", result_message=action.text)
        if action.kind == "wait":
            return written_call("sleep", duration=_plain(action.seconds))
        points = [{"x": x, "y": y} for x, y in self._named(action, screen)]
        option = next((name for name, kind in self.OPTIONS.items() if kind == action.kind), None)
        word = "click" if option else next((name for name, kind in self.TYPES.items() if kind == action.kind), None)
        if word is None:
            raise ValueError(f"GBox's tools have no {action.kind}")
        given: dict[str, object] = {"action_type": word}
        if option:
            given |= {"option": option, "target": points[0] if points else action.target}
        elif action.kind == "drag":
            given |= {"start_target": points[0], "end_target": points[1]}
        elif action.kind == "scroll":
            across = abs(action.dx) > abs(action.dy)
            moved = action.dx if across else action.dy
            given |= {"direction": ("left", "right")[moved > 0] if across else ("up", "down")[moved > 0], "distance": _plain(abs(moved))}
        elif action.kind == "type":
            given["text"] = action.text
        else:
            given |= {"keys": list(action.keys)} if action.kind == "key" else {"button": action.keys[0]}
        return written_call("perform_action", **given)


def _plain(number: float) -> float:
    """A whole number without a point."""
    return int(number) if float(number).is_integer() else number


def _pair(value: object) -> tuple[object, object]:
    if isinstance(value, Mapping) and {"x", "y"} <= value.keys():
        return value["x"], value["y"]
    if not isinstance(value, list) or len(value) != 2:
        raise ActionError(f"a point is [x, y], not {value!r}")
    return value[0], value[1]


def _text(given: Mapping[str, object], key: str) -> str:
    value = given.get(key, "")
    if not isinstance(value, str):
        raise ActionError(f"{key} is a string, not {value!r}")
    return value


def _keys(value: object) -> tuple[str, ...]:
    """Names of keys in small letters, as worlds take them."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise ActionError(f"keys are a list of names, not {value!r}")
    return tuple(str(name).lower() for name in names)
