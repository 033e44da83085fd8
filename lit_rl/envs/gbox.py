"""Phones and desktops in the cloud: boxes of GBox as worlds, one for each episode."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import socket
import uuid
from collections.abc import Mapping
from typing import Literal

import psutil
from PIL import Image

from lit_rl.envs.actions import Action, Kind
from lit_rl.envs.base import Observation, Outcome, World, Worlds
from lit_rl.envs.failures import Limits, WorldError, limited
from lit_rl.envs.gbox_client import BASE_URL, DEFAULT_URL, GBoxClient, check_key
from lit_rl.envs.keyboard import gbox_keys
from lit_rl.envs.tasks import Task, known_keys
from lit_rl.envs.validators import Printed, Validator, parse_validators, validate
from lit_rl.errors import ConfigError

log = logging.getLogger(__name__)

SHARED_KINDS: frozenset[Kind] = frozenset(("click", "double_click", "right_click", "move", "drag", "scroll", "type", "key", "open", "wait"))
BOX_KINDS: Mapping[str, frozenset[Kind]] = {"linux": SHARED_KINDS, "android": SHARED_KINDS | {"long_press", "button"}}
OWNER = "lit_rl"
"""The label of every box that was made here."""
DURATION = re.compile(r"[1-9][0-9]*(ms|s|m|h)")
Params = Mapping[str, object]


class GBox(World):
    """One box. See `GBoxes`."""

    grounds = True

    def __init__(self, client: GBoxClient, box: str, kind: str, delay: float, limits: Limits) -> None:
        super().__init__(limits)
        self.kinds = BOX_KINDS[kind]
        self.client, self.box, self.delay = client, box, delay
        self.validators: list[Validator] = []
        self._shown: Image.Image | None = None  # what the last action brought with it
        self._last: Image.Image | None = None

    async def on_reset(self, task: Task, seed: int) -> str:
        self.validators = parse_validators(task.evaluator)
        for line in setup_commands(task.params):
            line = line.replace("{seed}", str(seed))
            printed = await self.client.command(self.box, line, self.limits.reset, again=False)
            if printed.code:
                raise WorldError(f"the setup command {line!r} ended with {printed.code}: {printed.output.strip()}")
        if app := task.params.get("open"):
            await self._open(str(app))
        return task.instruction

    async def on_screenshot(self) -> Observation:
        shown, self._shown = self._shown, None
        self._last = shown or await self.client.screenshot(self.box, self.limits.screenshot)
        return Observation(self._last)

    async def on_execute(self, action: Action) -> None:
        self._shown = None
        match action.kind:
            case "wait":
                await asyncio.sleep(action.seconds)
            case "open":
                await self._open(action.text)
            case "done" | "fail":
                pass
            case _:
                name, body = await self._request(action)
                self._shown = await self.client.act(self.box, name, body, delay=self.delay, seconds=self.limits.execute)

    async def _request(self, action: Action) -> tuple[str, Params]:
        """The action's path and body."""
        points = [{"x": round(x), "y": round(y)} for x, y in action.points or await self._found(action)]
        match action.kind:
            case "click" | "double_click" | "right_click":
                button = "right" if action.kind == "right_click" else "left"
                return "click", {**points[0], "button": button, "double": action.kind == "double_click"}
            case "long_press":
                return "long-press", {**points[0], "duration": "1000ms"}
            case "drag":
                return "drag", {"start": points[0], "end": points[1], "duration": "500ms"}
            case "scroll":
                width, height = self._last.size if self._last else (0, 0)
                place = points[0] if points else {"x": width // 2, "y": height // 2}
                return "scroll", {**place, "scrollX": round(action.dx), "scrollY": round(action.dy)}
            case "type":
                return "type", {"text": action.text}
            case "key":
                return "press-key", {"keys": gbox_keys(action.keys), "combination": True}
            case "button":
                return "press-button", {"buttons": list(action.keys)}
        return "move", points[0]

    async def _found(self, action: Action) -> tuple[tuple[float, float], ...]:
        if not action.target:
            return ()
        seen = self._last or await self.client.screenshot(self.box, self.limits.screenshot)
        return (await self.client.find(action.target, seen, self.limits.execute),)

    async def _open(self, app: str) -> None:
        path = f"/boxes/{self.box}/android/packages/{app}/open" if "button" in self.kinds else f"/boxes/{self.box}/browser/open"
        await self.client.ask(path, {} if "button" in self.kinds else {"url": app}, seconds=self.limits.execute)

    async def on_evaluate(self) -> Outcome:
        async def run(command: str) -> Printed:
            return await self.client.command(self.box, command, self.limits.evaluate, again=True)

        return await validate(self.validators, run)

    async def on_close(self) -> None:
        await self.client.terminate(self.box, self.limits.close)


def setup_commands(params: Params) -> list[str]:
    """The commands of `params.setup`. Raises ConfigError, beginning with the key."""
    known_keys(params, ("setup", "open"), "params.")
    lines = params.get("setup", [])
    if not isinstance(lines, list) or not all(isinstance(line, str) and line.strip() for line in lines):
        raise ConfigError(f"params.setup: {lines!r} is not a list of shell commands")
    if not isinstance(params.get("open", ""), str):
        raise ConfigError(f"params.open: {params['open']!r} is not the name of an app or an address")
    return lines


def this_process() -> str:
    """A name that no other process of this host has had since it started."""
    return f"{os.getpid()}-{int(psutil.Process().create_time())}"


def is_alive(process: str) -> bool:
    """Tell whether the process of such a name runs."""
    pid, _, created = process.partition("-")
    try:
        return int(psutil.Process(int(pid)).create_time()) == int(created)
    except (psutil.Error, ValueError):
        return False


class GBoxes(Worlds):
    """Boxes of a GBox service, whose key is `GBOX_API_KEY`. A box ends with its episode, at the latest after `expires_in`.

    A task has an `instruction`; its `params` may have `setup`, shell commands that begin an episode, in which {seed} stands for the seed,
    and `open`, an app; its evaluator is a command in the box and a comparator, such as {"command": "settings get global wifi_on",
    "equals": "1"}. Boxes carry labels. What a process of this host has left behind that no longer runs is ended at the start, and what
    this one has left at its end.

    Args:
        box_type: `android` or `linux`.
        base_url: The service; default: `GBOX_CLIENT_BASE_URL` in the environment, else https://gbox.ai/api/v1.
        create_timeout: How long the service may take to start a box, such as `60s`, at most `5m`.
        expires_in: Life of a box, such as `15m`: more than the longest episode.
        screenshot_delay: Seconds between an action and the screenshot that comes back with it.
        limits: Seconds that each call to a world may take.
    """

    def __init__(
        self,
        *,
        box_type: Literal["android", "linux"] = "android",
        base_url: str | None = None,
        create_timeout: str = "60s",
        expires_in: str = "15m",
        screenshot_delay: float = 0.3,
        limits: Limits | None = None,
    ) -> None:
        super().__init__(limits or Limits(reset=120.0))
        for name, value in (("create_timeout", create_timeout), ("expires_in", expires_in)):
            if not DURATION.fullmatch(value):
                raise ConfigError(f"{name}={value!r} is no duration; write 60s or 15m")
        self.kinds = BOX_KINDS[box_type]
        self.box_type, self.create_timeout, self.expires_in, self.delay = box_type, create_timeout, expires_in, screenshot_delay
        self.client = GBoxClient(base_url or os.environ.get(BASE_URL, "").strip() or DEFAULT_URL)
        self.host = {OWNER: "1", "host": socket.gethostname()}

    @property
    def mine(self) -> dict[str, str]:
        """Labels of this process's boxes."""
        return {**self.host, "process": this_process()}

    def check(self, task: Task) -> None:
        if not task.instruction:
            raise ConfigError("instruction: it is missing; a box does not write its own")
        setup_commands(task.params)
        parse_validators(task.evaluator)

    async def start(self) -> None:
        check_key()
        await self.client.open()
        try:
            await limited(self.sweep(self.host, dead=True), self.limits.reset, "GBox: looking for boxes of earlier runs", "limits.reset")
        except WorldError as error:
            cure = f"set base_url or {BASE_URL}, and see that it runs"
            raise ConfigError(f"GBox at {self.client.url} does not answer: {error}; {cure}") from error

    async def stop(self) -> None:
        try:
            if self.client.is_open:
                await limited(self.sweep(self.mine), self.limits.close, "GBox: ending the boxes that are left", "limits.close")
        except (WorldError, ConfigError) as error:
            log.warning("%s; what is left ends by itself after %s", error, self.expires_in)
        finally:
            await self.client.close()

    async def sweep(self, labels: Mapping[str, str], *, dead: bool = False) -> int:
        """End the boxes with these labels, and return how many. dead: Only those of processes that no longer run."""
        found = await self.client.running(labels, self.limits.close)
        left = [box for box in found if not (dead and is_alive(box.labels.get("process", "")))]
        await asyncio.gather(*[self.client.terminate(box.id, self.limits.close) for box in left])
        if left:
            log.warning("%d boxes that were left over are ended", len(left))
        return len(left)

    async def on_open(self) -> GBox:
        labels = {**self.mine, "episode": uuid.uuid4().hex}
        try:
            box = await self.client.create(
                self.box_type, wait=self.create_timeout, expires_in=self.expires_in, labels=labels, seconds=self.limits.reset
            )
        except (Exception, asyncio.CancelledError):  # the box may be there although its answer was lost
            await asyncio.shield(asyncio.ensure_future(self._forget(labels)))
            raise
        return GBox(self.client, box.id, self.box_type, self.delay, self.limits)

    async def _forget(self, labels: Mapping[str, str]) -> None:
        try:
            await limited(self.sweep(labels), self.limits.close, "GBox: looking for a box that was not answered", "limits.close")
        except (WorldError, ConfigError) as error:
            log.warning("%s", error)
