"""GBox against a fake of its service: the contract, faults of every kind, boxes that are left over; the real SDK against the fake."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import pytest
from contract import WorldContract
from fake_gbox import TOKEN, FakeGBox

from lit_rl.envs.actions import Action, ActionError
from lit_rl.envs.base import World, Worlds
from lit_rl.envs.failures import Limits, Status, WorldError
from lit_rl.envs.gbox import GBoxes, this_process
from lit_rl.envs.tasks import Task, read_tasks
from lit_rl.errors import ConfigError

T = TypeVar("T")
TASK = Task(
    id="buttons",
    instruction="Click the coloured button until it is gone.",
    params={"setup": ["desktop start buttons hits=2 seed={seed}"]},
    evaluator={"command": "desktop get solved", "equals": "1"},
)


@pytest.fixture(autouse=True, scope="module")
def key() -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GBOX_API_KEY", TOKEN)
        yield


async def solve(fake: FakeGBox, world: World) -> None:
    program = fake.boxes[world.box].desktop.program  # type: ignore[attr-defined]
    while not program.solved:
        await world.screenshot()
        await world.execute(program.oracle())


class TestGBoxContract(WorldContract):
    task = TASK

    async def prepare(self) -> None:
        type(self).fake = FakeGBox()
        await self.fake.server.start_server()

    async def finish(self) -> None:
        assert not self.fake.running
        await self.fake.server.close()

    def make(self) -> Worlds:
        return GBoxes(base_url=self.fake.url)

    async def solve(self, world: World) -> None:
        await solve(self.fake, world)


def served(body: Callable[[FakeGBox, GBoxes], Awaitable[T]], worlds: Callable[[str], GBoxes] = lambda url: GBoxes(base_url=url)) -> T:
    """The result of `body`, while the fake and the worlds run; no box may be left."""

    async def run() -> T:
        fake = FakeGBox()
        await fake.server.start_server()
        try:
            async with worlds(fake.url) as started:
                result = await body(fake, started)
            assert not fake.running
            return result
        finally:
            await fake.server.close()

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("path", "fault", "requests"),
    [
        ("/boxes/android", 503, 2),  # refused: asked again
        ("/actions/screenshot", 500, 2),
        ("/actions/screenshot", "drop", 2),
        ("/commands", 500, 2),  # the evaluator's, see below
        ("/terminate", "drop", 2),
    ],
)
def test_what_is_safe_is_asked_again(path: str, fault: int | str, requests: int) -> None:
    async def body(fake: FakeGBox, worlds: GBoxes) -> int:
        task = Task(id="a", instruction="x", evaluator=TASK.evaluator) if path == "/commands" else TASK
        fake.faults.append((path, fault))
        async with worlds.world() as world:
            await world.reset(task, 1)
            await world.screenshot()
            assert not (await world.evaluate()).success
        assert not fake.faults and worlds.counts["leaked"] == 0
        return sum(asked.endswith(path) for _, asked, _ in fake.asked) - (path == "/commands" and task is TASK)

    assert served(body) == requests


@pytest.mark.parametrize("fault", [500, 503, "drop", 404])
def test_a_click_is_never_sent_twice(fault: int | str) -> None:
    async def body(fake: FakeGBox, worlds: GBoxes) -> int:
        fake.faults.append(("/actions/click", fault))

        async def episode(world: World, attempt: int) -> int:
            await world.reset(TASK, 1)
            await solve(fake, world)
            assert (await world.evaluate()).success
            return attempt

        assert await worlds.attempts(episode) == 1  # in a fresh box
        first = next(iter(fake.boxes))
        return sum(path == f"/boxes/{first}/actions/click" for _, path, _ in fake.asked)

    assert served(body) == 1


def test_a_box_whose_answer_is_lost_or_late_is_found_and_ended() -> None:
    async def body(fake: FakeGBox, worlds: GBoxes) -> None:
        for fault in ("drop", 408):
            fake.faults.append(("/boxes/android", fault))
        with pytest.raises(WorldError, match="boxes/android") as caught:
            async with worlds.world():
                raise AssertionError
        assert caught.value.status is Status.RESET_FAILED and len(fake.boxes) == 1 and not fake.running
        async with worlds.world() as world:  # 408, then a box
            assert await world.reset(TASK, 1) == TASK.instruction

    served(body)


def test_a_service_that_hangs_ends_within_the_limit() -> None:
    async def body(fake: FakeGBox, worlds: GBoxes) -> None:
        async with worlds.world() as world:
            await world.reset(TASK, 1)
            fake.faults.append(("/actions/screenshot", "hang"))
            with pytest.raises(WorldError, match=r"screenshot|limits"):
                await world.screenshot()

    served(body, lambda url: GBoxes(base_url=url, limits=Limits(screenshot=0.2)))


def test_boxes_of_dead_processes_are_ended_at_the_start_and_others_are_let_be() -> None:
    async def body(fake: FakeGBox, worlds: GBoxes) -> list[bool]:
        fake.page_size = 2
        labels = [{**worlds.host, "process": "999999999-1"}] * 3 + [worlds.mine, {**worlds.host, "host": "other", "process": "1-1"}, {}]
        boxes = [await worlds.client.create("linux", wait="1s", expires_in="1m", labels=some, seconds=9) for some in labels]
        await worlds.start()
        running = [fake.boxes[box.id].status == "running" for box in boxes]
        for box in boxes[4:]:
            await worlds.client.terminate(box.id, 9)
        return running

    assert served(body) == [False] * 3 + [True] * 3  # the last but two is ended by the end of the worlds


def test_the_wire_is_the_services_own() -> None:
    actions = [
        Action(kind="click", x=1.4, y=2.6),
        Action(kind="click", target="there"),
        Action(kind="long_press", x=1, y=2),
        Action(kind="drag", x=1, y=2, x2=3, y2=4),
        Action(kind="scroll", dy=30),
        Action(kind="key", keys=("ctrl", "A")),
        Action(kind="key", keys=("pagedown",)),
        Action(kind="button", keys=("back",)),
        Action(kind="open", text="com.android.settings"),
        Action(kind="move", x=0, y=0),
    ]

    async def body(fake: FakeGBox, worlds: GBoxes) -> list[tuple[str, object]]:
        async with worlds.world() as world:
            await world.reset(TASK, 1)
            await world.screenshot()
            before = len(fake.asked)
            for action in actions:
                await world.execute(action)
            with pytest.raises(ActionError, match="nothing on the screen was found for 'nowhere'"):
                await world.execute(Action(kind="click", target="nowhere"))
            with pytest.raises(ActionError, match="there is no key 'ä'"):
                await world.execute(Action(kind="key", keys=("ä",)))
            fake.faults.append(("/actions/move", 422))
            with pytest.raises(ActionError, match="the machine refuses this action"):
                await world.execute(Action(kind="move", x=0, y=0))
            created = fake.asked[1][2]
            assert created["config"]["expiresIn"] == "15m" and created["timeout"] == "60s"
            assert created["config"]["labels"]["process"] == this_process()
            return [(path.split("/", 3)[-1], sent) for _, path, sent in fake.asked[before:]]

    sent = [(path, {name: value for name, value in row.items() if name != "options"}) for path, row in served(body) if path != "model"]
    assert sent[:10] == [
        ("actions/click", {"x": 1, "y": 3, "button": "left", "double": False}),
        ("actions/click", {"x": 10, "y": 20, "button": "left", "double": False}),
        ("actions/long-press", {"x": 1, "y": 2, "duration": "1000ms"}),
        ("actions/drag", {"start": {"x": 1, "y": 2}, "end": {"x": 3, "y": 4}, "duration": "500ms"}),
        ("actions/scroll", {"x": 48, "y": 48, "scrollX": 0, "scrollY": 30}),
        ("actions/press-key", {"keys": ["control", "a"], "combination": True}),
        ("actions/press-key", {"keys": ["pageDown"], "combination": True}),
        ("actions/press-button", {"buttons": ["back"]}),
        ("android/packages/com.android.settings/open", {}),
        ("actions/move", {"x": 0, "y": 0}),
    ]


def test_keys_that_are_missing_placeholders_or_rejected_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, state in [("", "is not in the environment"), ("your_gbox_api_key_here", "holds the template's placeholder")]:
        monkeypatch.setenv("GBOX_API_KEY", value)
        with pytest.raises(ConfigError, match=f"GBOX_API_KEY is not set: it {state}"):
            asyncio.run(GBoxes().start())
    monkeypatch.setenv("GBOX_API_KEY", "bad")
    with pytest.raises(ConfigError, match=r"GBOX_API_KEY was rejected by http://127.0.0.1:\d+/api/v1 \(401\)"):
        served(lambda fake, worlds: asyncio.sleep(0))
    with pytest.raises(ConfigError, match="does not answer.*set base_url or GBOX_CLIENT_BASE_URL"):
        asyncio.run(GBoxes(base_url="127.0.0.1:9", limits=Limits(reset=0.3)).start())


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (Task(id="a", evaluator=TASK.evaluator), "instruction: it is missing"),
        (Task(id="a", instruction="x"), "evaluator.command: it is missing"),
        (Task(id="a", instruction="x", params={"setup": "ls"}, evaluator=TASK.evaluator), "params.setup: 'ls' is not a list"),
    ],
)
def test_a_task_without_a_validator_is_refused(given: Task, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        GBoxes().check(given)
    assert str(caught.value).startswith(told)


def test_the_shipped_tasks_are_sound() -> None:
    for name in ("gbox_android", "gbox_desktop"):
        train, held_out = (read_tasks(f"configs/agent/tasks/{name}_{split}.jsonl", GBoxes().check) for split in ("train", "eval"))
        assert (
            train
            and held_out
            and not {task.instruction for task in train} & {task.instruction for task in held_out if name == "gbox_android"}
        )


def test_durations_are_checked() -> None:
    with pytest.raises(ConfigError, match="expires_in='15 minutes' is no duration"):
        GBoxes(expires_in="15 minutes")


def test_the_fake_is_what_the_real_sdk_speaks_to() -> None:
    sdk = pytest.importorskip("gbox_sdk")

    async def body(fake: FakeGBox, worlds: GBoxes) -> None:
        async with sdk.AsyncGboxClient(api_key=TOKEN, base_url=fake.url, max_retries=0) as client:
            boxes = client.v1.boxes
            box = await boxes.create_android(wait=True, api_timeout="60s", config={"expires_in": "15m", "labels": {"run": "r"}})
            await boxes.execute_commands(box.id, command="desktop start buttons seed=1")
            button = fake.boxes[box.id].desktop.program.oracle()
            await boxes.actions.click(box.id, x=button.x, y=button.y)
            printed = await boxes.execute_commands(box.id, command="desktop get hits")
            assert (printed.stdout, printed.exit_code) == ("1\n", 0)
            assert (await boxes.actions.screenshot(box.id, output_format="base64")).uri.startswith("data:image/png;base64,")
            assert [one.id for one in (await boxes.list(labels={"run": "r"})).data] == [box.id]
            await boxes.terminate(box.id, wait=True)
            with pytest.raises(sdk.NotFoundError):
                await boxes.actions.click(box.id, x=1, y=1)
        async with sdk.AsyncGboxClient(api_key="bad", base_url=fake.url, max_retries=0) as client:
            with pytest.raises(sdk.AuthenticationError):
                await client.v1.boxes.list()

    served(body)
