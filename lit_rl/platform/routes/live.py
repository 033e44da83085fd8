"""Events over WebSockets, as they happen."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import orjson
from fastapi import APIRouter, WebSocket, WebSocketDisconnect

from lit_rl.net.guards import ApiError
from lit_rl.platform.hub import Event, Listener
from lit_rl.platform.routes.jobs import JobId
from lit_rl.platform.service import Here, Service

router = APIRouter()
FRAMES_PER_SECOND = 10.0
SECONDS_TO_SEND = 20.0
"""A client that takes no frame for so long is left."""

TOPICS = frozenset(("metrics", "state", "gpu", "log", "checkpoint", "sample", "alert"))
AWAY, VIOLATION = 1001, 1008


@router.websocket("/ws")
async def everything(socket: WebSocket, here: Here, since: int | None = None) -> None:
    """States of all jobs, GPUs and alerts."""
    await serve(socket, here, None, since)


@router.websocket("/ws/jobs/{name}")
async def of_job(socket: WebSocket, name: JobId, here: Here, since: int | None = None) -> None:
    """Everything of one job."""
    await serve(socket, here, name, since)


async def serve(socket: WebSocket, here: Service, job: str | None, since: int | None) -> None:
    """Send events until one side ends: the client by leaving or by a word that is none, the server by its own end."""
    try:
        shown = None if job is None else here.records.shown(here.records.find(job))
    except ApiError as error:
        await socket.close(VIOLATION, error.code)
        return
    await socket.accept()
    listener, seq, missed = here.hub.listen(job, since=since)
    tasks = [asyncio.create_task(_speak(socket, here, listener, shown, seq, missed)), asyncio.create_task(_hear(socket, listener))]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        code = next((task.result() for task in done if not task.cancelled() and task.exception() is None), None)
        if code is not None:
            await socket.close(code)
    finally:
        here.hub.leave(listener)
        for task in tasks:
            task.cancel()


async def _speak(socket: WebSocket, here: Service, listener: Listener, shown: object, seq: int, missed: Sequence[Event] | None) -> int:
    """Send what waits, at most ten times a second; the code of the end."""
    hello = {"type": "hello", "epoch": here.hub.epoch, "seq": seq, **({} if shown is None else {"job": shown})}
    await _send(socket, hello)
    if missed is None:
        await _send(socket, {"type": "resync", "reason": "too_old"})
    for event in joined(missed or ()):
        await _send(socket, event)
    while not listener.closed:
        began = time.monotonic()
        events, lost = await listener.take()
        if lost:
            await _send(socket, {"type": "resync", "reason": "slow_client"})
        for event in joined(events):
            await _send(socket, event)
        await asyncio.sleep(max(0.0, 1 / FRAMES_PER_SECOND - (time.monotonic() - began)))
    return AWAY


async def _send(socket: WebSocket, event: Event) -> None:
    async with asyncio.timeout(SECONDS_TO_SEND):
        await socket.send_text(orjson.dumps(event).decode())


async def _hear(socket: WebSocket, listener: Listener) -> int | None:
    """Obey `subscribe` and `ping`; anything else ends the connection."""
    while True:
        try:
            word = orjson.loads(await socket.receive_text())
        except WebSocketDisconnect:
            return None
        except (orjson.JSONDecodeError, KeyError):
            return VIOLATION
        match word:
            case {"type": "subscribe", "topics": [*topics], **rest} if not rest and all(map(_known, topics)):
                listener.topics = frozenset(map(str, topics))
            case {"type": "ping"} if len(word) == 1:
                continue
            case _:
                return VIOLATION


def _known(topic: object) -> bool:
    return isinstance(topic, str) and topic in TOPICS


def joined(events: Sequence[Event]) -> Sequence[Event]:
    """The events, metrics of a job that follow each other as one, and of a GPU's figures the newest."""
    result: list[dict[str, object]] = []
    for event in events:
        last = result[-1] if result else {}
        if event["type"] == "metrics" and last.get("type") == "metrics" and last.get("job") == event.get("job"):
            points, more = last["points"], event["points"]
            assert isinstance(points, list) and isinstance(more, list)
            result[-1] = last | {"points": [*points, *more], "seq": event["seq"]}
        else:
            result.append(dict(event))
    return result
