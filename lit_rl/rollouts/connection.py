"""Requests to inference servers: many in flight, each tried again until its deadline."""

from __future__ import annotations

import asyncio
import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from lit_rl.net.addresses import token_from_environment
from lit_rl.net.answers import TooMuch, read_answer, retry_after
from lit_rl.rollouts.base import RolloutError
from lit_rl.rollouts.dialects import Unreadable, Unusable

if TYPE_CHECKING:
    import aiohttp

T = TypeVar("T")

PASSING = {408, 429, 502, 503, 504}
"""Statuses worth the same request again until the deadline."""
MAX_ANSWER = 256 << 20
"""Bytes of one answer: a million tokens with their log-probabilities have about 100 MiB."""


class Again(Exception):
    """Raised by `Call.read`: the answer is proper, and the request has to be made again, such as after an abort."""


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request. body: None is a GET. read: the parsed JSON (None where the body is none) to what the caller wants.

    urls: servers that may answer, in order of tries. done: answers of status 4xx with this pattern in them count as success.
    """

    urls: Sequence[str]
    route: str
    body: Mapping[str, Any] | None
    read: Callable[[Any], T]
    done: str | None = None


class Connection:
    """Runs calls in an asyncio loop of its own.

    Retried until the deadline: connection errors, timeouts, 408, 429 (waiting as Retry-After says), 502-504, aborts; each try asks the
    next of the call's servers. A body that is no answer is retried twice, 500 once, other statuses never.
    """

    def __init__(self, *, concurrency: int, timeout_s: float, deadline_s: float, token_env: str) -> None:
        self.concurrency, self.timeout_s, self.deadline_s, self.token_env = concurrency, timeout_s, deadline_s, token_env
        self.retries = 0

    def run(self, calls: Sequence[Call[T]]) -> list[T]:
        """The answers in order of the calls. Raises RolloutError when one has none."""
        return asyncio.run(self._all(calls))

    def wait_healthy(self, urls: Sequence[str], *, patience_s: float) -> None:
        """Return when every server answers GET /health with 200. Raises RolloutError naming one that does not, and what it said last."""
        asyncio.run(self._wait_healthy(urls, time.monotonic() + patience_s, patience_s))

    # ------------------------------------------------------------------ on the loop
    def _session(self) -> aiohttp.ClientSession:
        import aiohttp

        token = token_from_environment(self.token_env)
        headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {token}"} if token else {})
        return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=self.concurrency), headers=headers, auto_decompress=False)

    async def _all(self, calls: Sequence[Call[T]]) -> list[T]:
        gate = asyncio.Semaphore(self.concurrency)  # a deadline counts from when a request may go out
        try:
            async with self._session() as session, asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._outcome(session, gate, call)) for call in calls]
        except ExceptionGroup as errors:  # the first one cancelled the others
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _outcome(self, session: aiohttp.ClientSession, gate: asyncio.Semaphore, call: Call[T]) -> T:
        """The answer after all tries. Raises RolloutError."""
        from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

        backoff = wait_random_exponential(multiplier=0.1, max=10.0)

        def error_of(state: RetryCallState) -> _NoAnswer:
            assert state.outcome is not None
            error = state.outcome.exception()
            assert isinstance(error, _NoAnswer)
            return error

        async with gate:
            began = time.monotonic()
            until, tries = began + self.deadline_s, 0

            async def attempt() -> T:
                nonlocal tries
                tries += 1
                self.retries += tries > 1
                url = call.urls[(tries - 1) % len(call.urls)]
                return await _send(session, url, call, min(self.timeout_s, until - time.monotonic()))

            retrying = AsyncRetrying(
                retry=retry_if_exception_type(_NoAnswer),
                wait=lambda state: error_of(state).retry_after_s + backoff(state),
                stop=lambda state: tries >= error_of(state).tries or time.monotonic() + state.upcoming_sleep >= until,
                reraise=True,
            )
            try:
                return await retrying(attempt)
            except _NoAnswer as error:
                spent = f"{tries} {'try' if tries == 1 else 'tries'} in {time.monotonic() - began:.1f} s"
                late = f", engine.deadline_s={self.deadline_s:g}" if error.tries == math.inf else ""
                raise RolloutError(f"{error} ({spent}{late})") from error

    async def _wait_healthy(self, urls: Sequence[str], until: float, patience_s: float) -> None:
        async def wait(session: aiohttp.ClientSession, url: str) -> str:
            while said := await _health(session, url):
                if time.monotonic() >= until:
                    return said
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


class _NoAnswer(Exception):
    """A try that brought nothing. tries: give up after so many; retry_after_s: the server asked to wait."""

    def __init__(self, message: str, *, tries: float = math.inf, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.tries, self.retry_after_s = tries, retry_after_s


async def _send(session: aiohttp.ClientSession, url: str, call: Call[T], seconds: float) -> T:
    """One try. Raises _NoAnswer."""
    import aiohttp

    seconds, where = max(seconds, 0.001), f"inference server {url}{call.route}"
    limit = aiohttp.ClientTimeout(total=seconds, sock_connect=min(seconds, 5.0))
    method = "GET" if call.body is None else "POST"
    try:
        async with session.request(method, url + call.route, json=call.body, timeout=limit, allow_redirects=False) as response:
            status, text = response.status, await read_answer(response, MAX_ANSWER)
            wait = retry_after(response.headers.get("Retry-After"))
    except TooMuch as error:
        raise _NoAnswer(f"{where}: {error}", tries=3) from error
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        why = f"no answer in engine.timeout_s={seconds:.3g}" if isinstance(error, TimeoutError) else f"{type(error).__name__} {error}"
        raise _NoAnswer(f"{where}: {why}") from error
    said = text[:500].decode(errors="replace")
    if 400 <= status < 500 and call.done is not None and re.search(call.done, said, re.IGNORECASE):
        return call.read(None)
    if status != 200:
        raise _NoAnswer(
            f"{where}: status {status} {said}",
            tries=math.inf if status in PASSING else 2 if status == 500 else 1,
            retry_after_s=wait,
        )
    try:
        return call.read(_parsed(text))
    except Again as error:
        raise _NoAnswer(f"{where}: {error}") from error
    except Unreadable as error:
        raise _NoAnswer(f"{where}: {error} in {said[:200]!r}", tries=3) from error
    except Unusable as error:
        raise _NoAnswer(f"{where}: {error}", tries=1) from error


def _parsed(text: bytes) -> Any:
    """None of a body that is no JSON: some routes answer with a sentence."""
    try:
        return json.loads(text)
    except ValueError:
        return None


async def _health(session: aiohttp.ClientSession, url: str) -> str:
    """What is wrong with it; nothing if it is ready."""
    import aiohttp

    try:
        async with session.get(f"{url}/health", timeout=aiohttp.ClientTimeout(total=5.0), allow_redirects=False) as response:
            return "" if response.status == 200 else f"status {response.status}"
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        return f"{type(error).__name__} {error}"
