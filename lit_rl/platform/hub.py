"""Events are told to whoever listens; a listener that is too slow is told to look again, and holds up nobody."""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections import deque
from collections.abc import Mapping

KEPT = 5000
"""Events that a listener who comes back can still get."""

WAITING = 256
"""Events that wait for one listener."""

KEPT_WEIGHT, WAITING_WEIGHT = 1_000_000, 200_000
"""Numbers, or eight letters of a log each, in the events that are kept and in those that wait for one listener."""

Event = Mapping[str, object]


class Listener:
    """Events for one connection. job: of this job alone; None: states of all jobs, and what belongs to none."""

    def __init__(self, job: str | None, loop: asyncio.AbstractEventLoop) -> None:
        self.job, self.topics = job, frozenset[str]()
        self.lost = self.closed = False
        self._events: deque[Event] = deque()
        self._weight = 0
        self._loop, self._some, self._lock = loop, asyncio.Event(), threading.Lock()

    def wants(self, event: Event) -> bool:
        """True for events of its job and its topics."""
        mine = event.get("job") in (self.job, None) if self.job is not None else event["type"] in ("state", "gpu", "alert")
        return mine and (not self.topics or event["type"] in self.topics)

    def offer(self, event: Event, weight: int) -> None:
        """Take an event in, from any thread. Where too many wait, all are dropped."""
        with self._lock:
            self._weight += weight
            self.lost = self.lost or len(self._events) >= WAITING or self._weight > WAITING_WEIGHT
            if self.lost:
                self._events.clear()
            else:
                self._events.append(event)
        self._wake()

    def close(self) -> None:
        """Tell the connection that the server ends."""
        self.closed = True
        self._wake()

    async def take(self) -> tuple[list[Event], bool]:
        """The events that wait, at least one or the news that some were dropped; empty once closed."""
        await self._some.wait()
        with self._lock:
            self._some.clear()
            events, lost = list(self._events), self.lost
            self._events.clear()
            self.lost, self._weight = False, 0
        return events, lost

    def _wake(self) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._some.set)


class Hub:
    """The events of a server, numbered from 1. epoch: of this server, as another one's numbers begin anew."""

    def __init__(self) -> None:
        self.epoch, self.seq = secrets.token_hex(4), 0
        self._kept: deque[tuple[Event, int]] = deque()
        self._weight = 0
        self._listeners: set[Listener] = set()
        self._lock = threading.Lock()

    @property
    def heard(self) -> bool:
        """True while anybody listens."""
        return bool(self._listeners)

    def publish(self, kind: str, job: str | None = None, **payload: object) -> None:
        """Tell an event, from any thread."""
        with self._lock:
            self.seq += 1
            event = {"type": kind, "seq": self.seq, **({} if job is None else {"job": job}), **payload}
            weight = weight_of(payload)
            self._kept.append((event, weight))
            self._weight += weight
            while len(self._kept) > KEPT or self._weight > KEPT_WEIGHT:
                self._weight -= self._kept.popleft()[1]
            for listener in self._listeners:
                if listener.wants(event):
                    listener.offer(event, weight)

    def listen(self, job: str | None, *, since: int | None) -> tuple[Listener, int, list[Event] | None]:
        """A listener, the number of the newest event, and those after `since`; None in their place where some are not kept any more."""
        listener = Listener(job, asyncio.get_running_loop())
        with self._lock:
            self._listeners.add(listener)
            oldest = self.seq - len(self._kept)
            if since is None or since == self.seq:
                missed: list[Event] | None = []
            elif oldest <= since <= self.seq:
                missed = [event for event, _ in self._kept if int(str(event["seq"])) > since and listener.wants(event)]
            else:
                missed = None
            return listener, self.seq, missed

    def leave(self, listener: Listener) -> None:
        """Forget a listener."""
        with self._lock:
            self._listeners.discard(listener)

    def close(self) -> None:
        """Tell all listeners that the server ends."""
        with self._lock:
            for listener in self._listeners:
                listener.close()


def weight_of(payload: Mapping[str, object]) -> int:
    """Returns the size of an event, in numbers that it holds."""
    points, text = payload.get("points"), payload.get("text")
    numbers = sum(len(point.get("metrics", ())) + 4 for point in points if isinstance(point, Mapping)) if isinstance(points, list) else 0
    return 1 + numbers + (len(text) // 8 if isinstance(text, str) else 0)
