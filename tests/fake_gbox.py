"""A GBox service of its own: the REST interface, each box a tiny desktop that a shell command starts, and faults on demand."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from aiohttp import web
from aiohttp.test_utils import TestServer
from PIL import Image

from lit_rl.envs.actions import Action
from lit_rl.envs.desktop import Desktop
from lit_rl.envs.gbox_client import data_uri
from lit_rl.envs.tiny_desktop import PROGRAMS, checked_settings
from lit_rl.envs.validators import Printed

SIZE = 96
TOKEN = "good"
BODY = web.RequestKey("body", dict)


@dataclass
class FakeBox:
    kind: str
    labels: dict[str, str]
    expires: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    status: str = "running"
    desktop: Desktop | None = None

    def told(self) -> dict[str, object]:
        """The box as the service tells it; `gbox-sdk` reads these fields."""
        time = "2026-01-01T00:00:00.000Z"
        config = {"os": {"version": "12"}, "deviceType": "virtual", "workingDir": "/", "labels": self.labels, "envs": {}}
        machine = {"cpu": 2, "memory": 2048, "storage": 20}
        stamps = {"createdAt": time, "updatedAt": time, "expiresAt": time}
        return {"id": self.id, "type": self.kind, "status": self.status, "config": config | machine, **stamps}

    def shell(self, line: str) -> Printed:
        """`desktop start PROGRAM [seed=N] [SETTING=N ...]`, and the commands of the desktop."""
        words = line.split()
        if words[:2] == ["desktop", "start"]:
            given = {name: int(value) for name, value in (word.split("=") for word in words[3:])}
            seed, program = given.pop("seed", 0), PROGRAMS[words[2]]
            self.desktop = Desktop(program, checked_settings(program, given), size=SIZE, seed=seed)
            return Printed("", 0)
        return self.desktop.command(line) if self.desktop else Printed("desktop: no program runs\n", 1)

    def screen(self) -> str:
        return data_uri(self.desktop.picture() if self.desktop else Image.new("RGB", (SIZE, SIZE)))


def action_of(name: str, body: dict[str, object]) -> Action:
    """The action that a request asks for."""
    match name:
        case "click":
            kind = "double_click" if body.get("double") else "right_click" if body.get("button") == "right" else "click"
            return Action(kind=kind, x=body["x"], y=body["y"])
        case "drag":
            start, end = body["start"], body["end"]
            return Action(kind="drag", x=start["x"], y=start["y"], x2=end["x"], y2=end["y"])
        case "scroll":
            return Action(kind="scroll", x=body["x"], y=body["y"], dx=body["scrollX"], dy=body["scrollY"])
        case "type":
            return Action(kind="type", text=body["text"])
        case "press-key":
            return Action(kind="key", keys=tuple(key.lower() for key in body["keys"]))
    return Action(kind="wait", seconds=0)  # the pointer and a device's buttons do nothing on the desktop


@contextmanager
def gbox_in_thread() -> Iterator[FakeGBox]:
    """A service for programs that have an event loop of their own."""
    fake, loop = FakeGBox(), asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="gbox")
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(fake.server.start_server(), loop).result(60)
        yield fake
        asyncio.run_coroutine_threadsafe(fake.server.close(), loop).result(60)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


class FakeGBox:
    """faults: What happens to the next requests whose path ends so: a status, `drop` (the work is done, no answer comes) or `hang`."""

    def __init__(self) -> None:
        self.boxes: dict[str, FakeBox] = {}
        self.asked: list[tuple[str, str, object]] = []
        self.faults: list[tuple[str, int | str]] = []
        self.page_size = 100
        app = web.Application(middlewares=[self._guard], client_max_size=2**26)
        app.router.add_post("/api/v1/boxes/{kind:android|linux}", self._create)
        app.router.add_get("/api/v1/boxes", self._list)
        app.router.add_post("/api/v1/model", self._model)
        app.router.add_get("/api/v1/boxes/{id}", self._of_box)
        app.router.add_route("*", "/api/v1/boxes/{id}/{what:.+}", self._of_box)
        self.server = TestServer(app)

    @property
    def url(self) -> str:
        return str(self.server.make_url("/api/v1"))

    @property
    def running(self) -> list[FakeBox]:
        return [box for box in self.boxes.values() if box.status == "running"]

    @web.middleware
    async def _guard(self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> web.StreamResponse:
        body = request[BODY] = await request.json() if request.can_read_body else {}
        path = request.path.removeprefix("/api/v1")
        self.asked.append((request.method, path, body))
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return web.json_response({"message": "Unauthorized", "statusCode": 401}, status=401)
        fault = next((fault for fault in self.faults if path.endswith(fault[0])), None)
        if fault is None:
            return await handler(request)
        self.faults.remove(fault)
        if fault[1] == "hang":
            await asyncio.sleep(3600)
        if fault[1] == "drop":
            await handler(request)
            request.transport.close()
            return web.Response()
        return web.json_response({"message": "at fault"}, status=int(fault[1]))

    async def _create(self, request: web.Request) -> web.Response:
        config = request[BODY].get("config") or {}
        box = FakeBox(request.match_info["kind"], config.get("labels") or {}, config.get("expiresIn", ""))
        self.boxes[box.id] = box
        return web.json_response(box.told(), status=201)

    async def _list(self, request: web.Request) -> web.Response:
        wanted = {name[7:-1]: value for name, value in request.query.items() if name.startswith("labels[")}
        found = [
            box
            for box in self.boxes.values()
            if wanted.items() <= box.labels.items() and box.status in request.query.getall("status", [box.status])
        ]
        page = int(request.query.get("page", 1))
        some = found[(page - 1) * self.page_size : page * self.page_size]
        return web.json_response({"data": [box.told() for box in some], "page": page, "pageSize": self.page_size, "total": len(found)})

    async def _model(self, request: web.Request) -> web.Response:
        action = request[BODY]["action"]
        point = {"x": 10, "y": 20} if action["target"] == "there" else None
        return web.json_response({"id": "1", "response": {"type": action["type"], "coordinates": point}})

    async def _of_box(self, request: web.Request) -> web.Response:
        box, what = self.boxes.get(request.match_info["id"]), request.match_info.get("what", "")
        if box is None or (box.status == "terminated" and what):
            return web.json_response({"message": "Box not found", "statusCode": 404}, status=404)
        body = request[BODY]
        if what == "terminate":
            box.status = "terminated"
        if what in ("", "terminate"):
            return web.json_response(box.told())
        if what == "commands":
            output, code = box.shell(body["command"])
            return web.json_response({"stdout": output if code == 0 else "", "stderr": output if code else "", "exitCode": code})
        if what == "actions/screenshot":
            return web.json_response({"uri": box.screen()})
        if what.startswith("actions/"):
            if box.desktop:
                box.desktop.act(action_of(what.removeprefix("actions/"), body))
            after = {"screenshot": {"after": {"uri": box.screen()}}} if "options" in body else {}
            return web.json_response({"actionId": "1", "message": "Action executed successfully", **after})
        return web.json_response({})
