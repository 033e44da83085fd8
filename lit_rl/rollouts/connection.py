"""Requests to inference servers: many in flight, each tried again until its deadline."""

from __future__ import annotations

import asyncio
import io
import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING, Generic, TypeVar

from lit_rl.net.retry import UNREADABLE_TRIES, NoAnswer, Patience, exchange, health, open_session, refusal, retried
from lit_rl.rollouts.base import RolloutError
from lit_rl.rollouts.dialects import Unreadable, Unusable

if TYPE_CHECKING:
    import aiohttp

T = TypeVar("T")

MAX_ANSWER = 256 << 20
"""Bytes of one answer: a million tokens with their log-probabilities have about 100 MiB."""
MAX_WAIT = 10.0
"""Seconds of the longest back-off."""


class Forgotten(RolloutError):
    """The server does not hold the weights that the request names: it was restarted, or something else unloaded them."""


class Again(Exception):
    """Raised by `Call.read`: the answer is proper, and the request has to be made again, such as after an abort."""


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request. body: None is a GET. read: the parsed JSON (None where the body is none) to what the caller wants.

    urls: servers that may answer, in order of tries. done: answers of status 4xx with this pattern in them count as success.
    forgotten: those with this pattern raise Forgotten.
    """

    urls: Sequence[str]
    route: str
    body: Mapping[str, object] | None
    read: Callable[[object], T]
    done: str | None = None
    forgotten: str | None = None


class Connection:
    """Runs calls in an asyncio loop of its own.

    Retried until the deadline: connection errors, timeouts, 408, 429 (waiting as Retry-After says), 502-504, aborts; each try asks the
    next of the call's servers. A body that is no answer is retried twice, 500 once, other statuses never. Servers at whose addresses
    nothing has listened for `down_s` are dead: their requests fail then, long before the deadline.
    """

    def __init__(self, *, concurrency: int, timeout_s: float, deadline_s: float, down_s: float, token_env: str) -> None:
        self.concurrency, self.timeout_s, self.deadline_s, self.token_env = concurrency, timeout_s, deadline_s, token_env
        self.down_s = down_s
        self.retries = 0

    def run(self, calls: Sequence[Call[T]]) -> list[T]:
        """The answers in order of the calls. Raises RolloutError when one has none."""
        found: list[tuple[int, list[T]]] = []
        asyncio.run(self._all([calls], found.append))
        return found[0][1]

    def stream(self, groups: Sequence[Sequence[Call[T]]]) -> Iterator[tuple[int, list[T]]]:
        """(place, answers) of each group of calls as soon as it has all of its own. Raises RolloutError when one has none.

        All groups are under way at once, in a thread: `concurrency` is the only limit, and a slow answer keeps no other group from being
        asked. What is under way ends with the iterator.
        """
        told: SimpleQueue[tuple[int, list[T]] | BaseException] = SimpleQueue()
        loop = asyncio.new_event_loop()
        work = loop.create_task(self._all(groups, told.put))

        def until_all_are_told() -> None:
            try:
                loop.run_until_complete(work)
            except BaseException as error:  # raised where the answers are asked for
                told.put(error)

        thread = threading.Thread(target=until_all_are_told, daemon=True, name="answers")
        thread.start()
        try:
            for _ in groups:
                if isinstance(found := told.get(), BaseException):
                    raise found
                yield found
        finally:
            if thread.is_alive():
                loop.call_soon_threadsafe(work.cancel)
            thread.join()
            loop.close()

    def wait_healthy(self, urls: Sequence[str], *, patience_s: float) -> None:
        """Return when every server answers GET /health with 200. Raises RolloutError naming one that does not, and what it said last."""
        asyncio.run(self._wait_healthy(urls, time.monotonic() + patience_s, patience_s))

    # ------------------------------------------------------------------ on the loop
    def _session(self) -> aiohttp.ClientSession:
        import aiohttp

        return open_session(token_env=self.token_env, connector=aiohttp.TCPConnector(limit=self.concurrency))

    async def _all(self, groups: Sequence[Sequence[Call[T]]], tell: Callable[[tuple[int, list[T]]], None]) -> None:
        """Have `tell` called with the place of each group and its answers."""

        async def of_group(place: int, tasks: Sequence[asyncio.Task[T]]) -> None:
            tell((place, [await task for task in tasks]))

        gate = asyncio.Semaphore(self.concurrency)  # a deadline counts from when a request may go out
        try:
            async with self._session() as session, asyncio.TaskGroup() as everything:
                tasks = [[everything.create_task(self._outcome(session, gate, call)) for call in calls] for calls in groups]
                for place, group in enumerate(tasks):
                    everything.create_task(of_group(place, group))
        except ExceptionGroup as errors:  # the first one cancelled the others
            raise errors.exceptions[0] from None

    async def _outcome(self, session: aiohttp.ClientSession, gate: asyncio.Semaphore, call: Call[T]) -> T:
        """The answer after all tries. Raises RolloutError."""
        async with gate:
            began = time.monotonic()
            patience, made, seen = Patience(self.timeout_s, began + self.deadline_s), 0, began

            async def attempt(number: int) -> T:
                nonlocal made, seen
                made = number
                self.retries += number > 1
                url = call.urls[(number - 1) % len(call.urls)]
                try:
                    with patience.try_once() as seconds:
                        return await _send(session, url, call, seconds)
                except NoAnswer as error:
                    if not error.absent:
                        seen = time.monotonic()
                    elif time.monotonic() - seen >= self.down_s and number >= len(call.urls):
                        raise NoAnswer(f"{error}: {_gone(call.urls, self.down_s)}", tries=1) from error
                    raise

            try:
                return await retried(attempt, until=patience.until, max_wait_s=min(MAX_WAIT, self.down_s / 4))
            except NoAnswer as error:
                spent = f"{made} {'try' if made == 1 else 'tries'} in {time.monotonic() - began:.1f} s"
                late = f", engine.deadline_s={self.deadline_s:g}" if error.tries == math.inf else ""
                raise RolloutError(f"{error} ({spent}{late})") from error

    async def _wait_healthy(self, urls: Sequence[str], until: float, patience_s: float) -> None:
        async def wait(session: aiohttp.ClientSession, url: str) -> str:
            while (said := await health(session, url)) != 200:
                if time.monotonic() >= until:
                    return f"status {said}" if isinstance(said, int) else said
                await asyncio.sleep(min(1.0, max(0.05, until - time.monotonic())))
            return ""

        async with self._session() as session:
            found = await asyncio.gather(*(wait(session, url) for url in urls))
        for url, said in zip(urls, found):
            if said:
                raise RolloutError(
                    f"inference server {url} is not ready after engine.health_s={patience_s:g} s: GET /health gives {said}; "
                    "start it, correct engine.urls, or wait longer"
                )


def _gone(urls: Sequence[str], seconds: float) -> str:
    return (
        f"the server is gone (nothing has listened at {', '.join(urls)} for engine.down_s={seconds:g} s). Read its log, start it again and "
        "continue the run with --ckpt_path; raise engine.down_s where something restarts it by itself and its start takes longer"
    )


async def _send(session: aiohttp.ClientSession, url: str, call: Call[T], seconds: float) -> T:
    """One try. Raises NoAnswer."""
    where = f"inference server {url}{call.route}"
    body = None if call.body is None else io.BytesIO(json.dumps(call.body).encode())
    headers = {} if body is None else {"Content-Type": "application/json"}
    status, text, wait = await exchange(
        session,
        url + call.route,
        name=where,
        seconds=seconds,
        limit=MAX_ANSWER,
        knob="engine.timeout_s",
        body=body,
        headers=headers,
    )
    said = text[:500].decode(errors="replace")
    if 400 <= status < 500 and call.done is not None and re.search(call.done, said, re.IGNORECASE):
        return call.read(None)
    if 400 <= status < 500 and call.forgotten is not None and re.search(call.forgotten, said):
        raise Forgotten(f"{where}: status {status} {said}")
    if status != 200:
        raise refusal(f"{where}: status {status} {said}", status=status, wait=wait)
    try:
        return call.read(_parsed(text))
    except Again as error:
        raise NoAnswer(f"{where}: {error}") from error
    except Unreadable as error:
        raise NoAnswer(f"{where}: {error} in {said[:200]!r}", tries=UNREADABLE_TRIES) from error
    except Unusable as error:
        raise NoAnswer(f"{where}: {error}", tries=1) from error


def _parsed(text: bytes) -> object:
    """None of a body that is no JSON: some routes answer with a sentence."""
    try:
        return json.loads(text)
    except ValueError:
        return None
