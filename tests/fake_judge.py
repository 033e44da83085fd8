"""A judge that speaks the OpenAI chat protocol on 127.0.0.1: it answers as a function says, remembers what it was asked, and has faults."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from aiohttp import web
from rewards.fault_proxy import Fault, LocalServer


@dataclass(frozen=True)
class Asked:
    """One question. images: uint8 [H, W, 3] each, decoded; text: what stands beside them; body: as it came."""

    text: str
    images: list[np.ndarray]
    body: Mapping[str, Any]


Answer = Callable[[Asked], str]


class FakeJudge(LocalServer):
    """Each question takes the next of `faults`, and is answered by `answer` when none is left.

    Kinds of faults: status, drop, hang, slow, garbage, those of `Fault`; and length (cut off), null (no text), empty (no choices).
    """

    def __init__(self, answer: Answer, faults: Iterable[Fault] = (), *, model: str = "UnifiedReward") -> None:
        super().__init__()
        self.reply, self.faults, self.model = answer, iter(faults), model
        self.asked: list[Asked] = []
        self.at_once = self.most_at_once = 0
        self.headers: list[Mapping[str, str]] = []

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/health", self._health), web.get("/v1/models", self._models), web.post("/v1/chat/completions", self._chat)]

    async def closing(self) -> None:
        for task in asyncio.all_tasks(self.loop) - {asyncio.current_task()}:
            task.cancel()

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": self.model, "object": "model"}]})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            body = json.loads(await request.read())
            self.headers.append(dict(request.headers))
            self.asked.append(asked_by(body))
            return await self._answer(request, self.asked[-1], next(self.faults, Fault("ok")))
        finally:
            self.at_once -= 1

    async def _answer(self, request: web.Request, asked: Asked, fault: Fault) -> web.StreamResponse:
        if fault.kind == "status":
            headers = {"Retry-After": fault.retry_after} if fault.retry_after else {}
            return web.json_response({"error": {"message": "as scripted"}}, status=fault.status, headers=headers)
        if fault.kind in ("hang", "slow"):
            await asyncio.sleep(3600 if fault.kind == "hang" else fault.seconds)
        if fault.kind == "drop" and request.transport is not None:
            request.transport.abort()
        if fault.kind == "garbage":
            return web.Response(text='<html>{"choices": [')
        finish, text = ("length" if fault.kind == "length" else "stop"), None if fault.kind == "null" else self.reply(asked)
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
        usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
        choices = [] if fault.kind == "empty" else [choice]
        return web.json_response({"id": "x", "object": "chat.completion", "model": self.model, "choices": choices, "usage": usage})


def asked_by(body: Mapping[str, Any]) -> Asked:
    """The question in a body: pictures decoded, the last text that stands beside them."""
    from PIL import Image

    parts = body["messages"][-1]["content"]
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    images = [np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")) for url in urls]
    return Asked([part["text"] for part in parts if part["type"] == "text"][-1], images, body)


def brightest(asked: Asked) -> str:
    """A judge of pairs that prefers the brighter picture, wherever it stands."""
    first, second = (float(image.mean()) for image in asked.images)
    return f"<think>They differ.</think>\n<answer>Image {1 if first > second else 2} is better</answer>"
