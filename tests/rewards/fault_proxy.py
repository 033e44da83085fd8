"""A reward server small enough to know every score, and a proxy that stands before it and injects faults."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import NamedTuple, Self

import aiohttp
import numpy as np
import torch
from aiohttp import web
from torch import Tensor

from lit_rl.rewards.service.wire import decode_batch


class LocalServer(ABC):
    """An aiohttp application on 127.0.0.1, on a loop in a thread. `stop` cuts every connection; `start` takes the same port again."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._stop: threading.Event | None = None

    @abstractmethod
    def routes(self) -> list[web.RouteDef]:
        """The routes that it answers."""

    async def opened(self) -> None:  # noqa: B027  (optional by design)
        """Called on the loop before the first request."""

    async def closing(self) -> None:  # noqa: B027
        """Called on the loop after the last."""

    def start(self) -> Self:
        ready = threading.Event()
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=lambda: self.loop.run_until_complete(self._serve(ready)), daemon=True)
        self.thread.start()
        assert ready.wait(60), "the local server did not start"
        return self

    def stop(self) -> None:
        if self.thread.is_alive():
            self.loop.call_soon_threadsafe(self._bye.set)
            self.thread.join(10)
        self.loop.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    async def _serve(self, ready: threading.Event) -> None:
        self._bye = asyncio.Event()
        app = web.Application(client_max_size=1 << 28)
        app.add_routes(self.routes())
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.0)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", self.port, reuse_address=True).start()
        await self.opened()
        ready.set()
        await self._bye.wait()
        await self.closing()
        await runner.cleanup()


class RedServer(LocalServer):
    """`red` = red of the first pixel / 255, `blue` likewise. A prompt `unscorable...` gets an error, `null...` a null number."""

    def __init__(self, *, health: bool = True) -> None:
        super().__init__()
        self.has_health = health
        self.headers: list[dict[str, str]] = []
        self.targets: list[list[str | None] | None] = []
        self.masks: list[list[np.ndarray] | None] = []

    def routes(self) -> list[web.RouteDef]:
        health = [web.get("/health", self._health)] if self.has_health else []
        return [web.post("/score", self._single), web.post("/v1/score_batch", self._batch), *health]

    async def _health(self, _: web.Request) -> web.Response:
        return web.json_response({"status": "ready"})

    async def _single(self, request: web.Request) -> web.Response:
        from PIL import Image

        self.headers.append(dict(request.headers))
        query = await request.json()
        image, *masks = (np.asarray(Image.open(io.BytesIO(base64.b64decode(query[key])))) for key in ("image", "mask") if key in query)
        self.targets.append([query.get("target")])
        self.masks.append(masks or None)
        return web.json_response({"red": image[0, 0, 0] / 255, "blue": image[0, 0, 2] / 255, "ocr_text": "?"})

    async def _batch(self, request: web.Request) -> web.Response:
        self.headers.append(dict(request.headers))
        batch = decode_batch(await request.read())
        self.targets.append(batch.targets)
        self.masks.append(batch.masks)
        scores, errors = [], {}
        for i, (image, prompt) in enumerate(zip(batch.images, batch.prompts, strict=True)):
            if prompt.startswith("unscorable"):
                errors[str(i)] = {"code": "model_error", "message": "cannot read it"}
                scores.append(None)
            else:
                scores.append({"red": None if prompt.startswith("null") else image[0, 0, 0] / 255, "blue": image[0, 0, 2] / 255})
        return web.json_response({"scores": scores, "errors": errors})


class Fault(NamedTuple):
    """kind: `ok`, `status`, `drop` (connection cut), `cut` (half an answer), `garbage`, `short` (one score too few), `slow`, `hang`."""

    kind: str
    status: int = 0
    retry_after: str | None = None
    seconds: float = 0.0


class FaultProxy(LocalServer):
    """Forwards to `target`; each POST takes the next of `faults`, and is forwarded unharmed when none is left."""

    def __init__(self, target: str, faults: Iterable[Fault] = ()) -> None:
        super().__init__()
        self.target, self.faults = target, iter(faults)
        self.posts: list[float] = []  # times on the proxy's loop
        self.connections: set[object] = set()
        self.in_flight = self.most_in_flight = 0
        self.health: list[int] = []  # statuses to answer before forwarding GET /health again
        self.probes = 0

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/health", self._health), web.post("/{path:.*}", self._post)]

    async def opened(self) -> None:
        self.session = aiohttp.ClientSession()

    async def closing(self) -> None:
        await self.session.close()

    async def _health(self, _: web.Request) -> web.Response:
        self.probes += 1
        if self.health:
            return web.json_response({"status": "loading"}, status=self.health.pop(0))
        async with self.session.get(f"{self.target}/health") as answer:
            return web.Response(status=answer.status, body=await answer.read())

    async def _post(self, request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        self.connections.add(request.transport.get_extra_info("peername"))
        self.posts.append(asyncio.get_running_loop().time())
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            return await self._answer(request, next(self.faults, Fault("ok")))
        finally:
            self.in_flight -= 1

    async def _answer(self, request: web.Request, fault: Fault) -> web.StreamResponse:
        body = await request.read()
        assert request.transport is not None
        if fault.kind == "status":
            headers = {"Retry-After": fault.retry_after} if fault.retry_after else {}
            return web.json_response({"error": "injected"}, status=fault.status, headers=headers)
        if fault.kind == "drop":
            request.transport.abort()
        if fault.kind == "hang":
            await self._bye.wait()
        await asyncio.sleep(fault.seconds)
        headers = {k: v for k, v in request.headers.items() if k.lower() not in ("host", "content-length")}
        async with self.session.post(self.target + request.path, data=body, headers=headers) as answer:
            text, status = await answer.read(), answer.status
        if fault.kind == "garbage":
            text = b"<html>502 but says 200</html>"
        if fault.kind == "short":
            parsed = json.loads(text)
            text = json.dumps({**parsed, "scores": parsed["scores"][:-1]}).encode()
        if fault.kind == "cut":
            response = web.StreamResponse(headers={"Content-Length": str(len(text))})
            await response.prepare(request)
            await response.write(text[: len(text) // 2])
            request.transport.abort()
            return response
        return web.Response(status=status, body=text, content_type="application/json")


def red_images(reds: Iterable[int], *, size: int = 4) -> Tensor:
    """uint8 "B 3 size size" whose first pixels have these reds (and blue 255 - red), on a ground that is not constant."""
    reds = list(reds)
    media = torch.arange(len(reds) * 3 * size * size, dtype=torch.uint8).reshape(len(reds), 3, size, size) % 7
    media[:, 0, 0, 0] = torch.tensor(reds, dtype=torch.uint8)
    media[:, 2, 0, 0] = 255 - torch.tensor(reds, dtype=torch.uint8)
    return media
