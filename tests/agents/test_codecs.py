"""Dialects of actions: what is written is read back, in every coordinate space; what is no action is told, and never crashes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lit_rl.agents.codecs import Codec, Compact
from lit_rl.agents.screens import Screen, coordinates
from lit_rl.agents.tool_codecs import GBoxTools, QwenComputerUse
from lit_rl.envs.actions import Action, ActionError
from lit_rl.envs.tiny_desktop import DESKTOP_KINDS
from lit_rl.errors import ConfigError

SCREEN = Screen((160, 210), (140, 196))
SPACES = ("pixels", "resized", "norm1000", "bins:8", "bins:210")
CODECS = {"compact": Compact, "qwen": QwenComputerUse, "gbox": GBoxTools}
by_space = pytest.mark.parametrize("space", SPACES)
by_codec = pytest.mark.parametrize("kind", CODECS.values(), ids=CODECS)


# ---------------------------------------------------------------------- coordinates
@by_space
@given(x=st.integers(0, 159), y=st.integers(0, 209))
def test_a_point_is_found_again_as_near_as_the_space_names_points(space: str, x: int, y: int) -> None:
    """Within half the distance of two names, and the same name again."""
    named = coordinates(space)
    across, down = named.extent(SCREEN)
    found = named.pixels(*named.written((x, y), SCREEN), SCREEN)
    assert abs(found[0] - x) <= max(1.0, 160 / across) / 2 + 0.51 and abs(found[1] - y) <= max(1.0, 210 / down) / 2 + 0.51
    assert named.written(found, SCREEN) == named.written((x, y), SCREEN)
    assert 0 <= found[0] < 160 and 0 <= found[1] < 210


def test_bins_by_hand() -> None:
    """Two columns of 80 pixels: the middle of the second is 120; three rows of 70: the middle of the first is 35."""
    assert coordinates("bins:2").pixels(1, 0, SCREEN) == (120, 52.5)
    assert coordinates("bins:2").written((159, 104), SCREEN) == (1, 0) and coordinates("bins:2").written((79.9, 105), SCREEN) == (0, 1)
    assert coordinates("pixels").pixels(7, 9, SCREEN) == (7, 9)


@pytest.mark.parametrize("space", ["bins", "bins:0", "bins:x", "norm", ""])
def test_a_space_that_there_is_not(space: str) -> None:
    with pytest.raises(ConfigError, match="codec.space=.*is no coordinate space: choose pixels, resized, norm1000, or bins:N"):
        coordinates(space)


# ---------------------------------------------------------------------- round trips
ACTIONS = [
    Action(kind="click", x=40, y=100),
    Action(kind="right_click", x=0, y=0),
    Action(kind="double_click", x=159, y=209),
    Action(kind="drag", x=10, y=20, x2=150, y2=200),
    Action(kind="scroll", dy=120),
    Action(kind="scroll", dy=-30),
    Action(kind="type", text='a "quoted" <b> ü'),
    Action(kind="key", keys=("control", "a")),
    Action(kind="button", keys=("back",)),
    Action(kind="wait", seconds=2.5),
    Action(kind="done", text="the answer is 42"),
    Action(kind="fail"),
]


@by_codec
@by_space
@pytest.mark.parametrize("action", ACTIONS, ids=lambda action: action.kind)
def test_what_is_written_is_read_back(kind: type[Codec], space: str, action: Action) -> None:
    codec = kind(space)
    found = codec.read(codec.write(action, SCREEN), SCREEN)
    assert codec.write(found, SCREEN) == codec.write(action, SCREEN)
    assert (found.kind, found.text, found.keys, found.dy, found.seconds) == (
        action.kind,
        action.text,
        action.keys,
        action.dy,
        action.seconds,
    )
    assert all(0 <= x < 160 and 0 <= y < 210 for x, y in found.points) and len(found.points) == len(action.points)


@by_codec
def test_the_system_message_names_the_actions_of_the_world_alone(kind: type[Codec]) -> None:
    told = kind("norm1000").system(frozenset({"click", "type"}), SCREEN, 7)
    assert "7 turns" in told and "scroll" not in told.replace("for scroll", "") and "click" in told
    assert Compact(prompt=False).system(DESKTOP_KINDS, SCREEN, 3) == ""


def test_words_by_hand() -> None:
    codec = Compact("bins:3")
    assert codec.read(" click 2 0\n", SCREEN) == Action(kind="click", x=160 * 5 / 6, y=35)
    assert codec.read("type hello world", None) == Action(kind="type", text="hello world")
    for wrong, said in {
        "click 3 0": r"\(3, 0\) is outside of the screen, whose coordinates are 0 to 2",
        "click 1": "click takes 2 numbers",
        "click one two": "two numbers",
        "click nan 0": "two numbers",
        "click 1 1 1": "click takes 2 numbers",
        "": "is no action",
        "Click 1 1": "is no action",
        "type": "type needs text",
        "wait 61": "wait takes 0 to 60 seconds",
        "wait soon": "number of seconds",
        "scroll 0 0": "scroll needs dx or dy",
        "key": "key needs keys",
    }.items():
        with pytest.raises(ActionError, match=said):
            codec.read(wrong, SCREEN)
    with pytest.raises(ActionError, match="there is no screen here"):
        codec.read("click 1 1", None)


def test_qwen_by_hand() -> None:
    codec = QwenComputerUse()
    text = '<tool_call>\n{"name": "computer_use", "arguments": {"action": "left_click", "coordinate": [500, 250]}}\n</tool_call>'
    found = codec.read(f"I will click. {text}", SCREEN)
    assert found.kind == "click" and (found.x, found.y) == pytest.approx((80.08, 52.605))
    up = '<tool_call>{"name": "computer_use", "arguments": {"action": "scroll", "pixels": 50}}</tool_call>'
    assert codec.read(up, SCREEN).dy == -50, "the wheel turned upwards shows what is further up"
    for wrong, said in {
        text + text: "one <tool_call>.*not 2",
        "click": "not 0",
        "<tool_call>{</tool_call>": "is not JSON",
        '<tool_call>["a"]</tool_call>': "a tool call is",
        text.replace("computer_use", "shell"): "there is no tool 'shell'",
        text.replace("left_click", "hover"): "has no action 'hover'; there are left_click",
        text.replace("[500, 250]", "[500]"): r"a point is \[x, y\]",
        text.replace("500", "1000"): "outside of the screen",
        text.replace("500", "true"): "two numbers",
    }.items():
        with pytest.raises(ActionError, match=said):
            codec.read(wrong, SCREEN)


def test_gbox_targets_are_words() -> None:
    codec = GBoxTools()
    target = {"element": "button", "label": "Wi-Fi", "color": "blue"}
    call = {"name": "perform_action", "arguments": {"action_type": "click", "option": "double", "target": target}}
    found = codec.read(f"<tool_call>{json.dumps(call)}</tool_call>", SCREEN)
    assert found.kind == "double_click" and found.target == "element: button, label: Wi-Fi, color: blue" and not found.points
    for given_, said in {
        '{"action_type": "click"}': "a click needs a target",
        '{"action_type": "click", "option": "middle", "target": "x"}': "no option 'middle'; there are left, right, double",
        '{"action_type": "fly"}': "no action_type 'fly'",
        '{"action_type": "scroll", "direction": "in"}': "no direction 'in'",
        '{"action_type": "swipe"}': "a point is",
    }.items():
        with pytest.raises(ActionError, match=said):
            codec.read(f'<tool_call>{{"name": "perform_action", "arguments": {given_}}}</tool_call>', SCREEN)
    swipe = '<tool_call>{"name": "perform_action", "arguments": {"action_type": "swipe", "direction": "up"}}</tool_call>'
    assert codec.read(swipe, SCREEN) == Action(kind="scroll", dy=300), "a finger that moves up shows what is further down"


# ---------------------------------------------------------------------- whatever a model says
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
KEYS = ("action", "coordinate", "coordinate2", "text", "keys", "pixels", "time", "status", "action_type", "option", "target", "duration")
WORDS = ("left_click", "click", "scroll", "type", "key", "wait", "terminate", "swipe", "left_click_drag", "success", "down")
ARGUMENTS = st.dictionaries(st.sampled_from(KEYS), JSON | st.sampled_from(WORDS), max_size=5)
NAMES = st.sampled_from(("computer_use", "perform_action", "sleep", "report_task_complete", "other"))


def reads_or_tells(text: str) -> None:
    for kind in CODECS.values():
        try:
            found = kind("norm1000").read(text, SCREEN)
        except ActionError as error:
            assert str(error)
        else:
            assert isinstance(found, Action)


@settings(max_examples=150, deadline=None)
@given(name=NAMES, arguments=ARGUMENTS)
def test_any_tool_call_is_an_action_or_a_sentence(name: str, arguments: dict[str, Any]) -> None:
    reads_or_tells(f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>")


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=40) | st.tuples(st.sampled_from((*WORDS, "drag", "done")), st.text(max_size=12)).map(" ".join))
@example("<tool_call>" + "[" * 20000 + "</tool_call>")
@example("click 1e5 9" * 3)
@example("wait ９")
def test_any_text_is_an_action_or_a_sentence(text: str) -> None:
    reads_or_tells(text)
