"""Requests that are tried again: which failures may pass, how long to wait, and when to give up.

A request is safe to send again when asking twice gives what asking once gives, as for scores, for answers with a seed of their own, and for
weights under a name. Clients send no other requests through here.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, NamedTuple, TypeVar

from lit_rl.net.addresses import token_from_environment
from lit_rl.net.bodies import TooMuch, read_answer, retry_after

if TYPE_CHECKING:
    import aiohttp

T = TypeVar("T")

TOO_LATE = 504
OUTAGE = {502, 503, TOO_LATE}
"""Statuses that say nobody sensible is there."""
PASSING = OUTAGE | {408, 429}
"""Statuses worth the same request again until the deadline."""
UNREADABLE_TRIES = 3
"""Tries of a request whose answers cannot be read."""
CONNECT_SECONDS = 5.0
HEALTH_SECONDS = 5.0
FIRST_WAIT = 0.1
"""Seconds of the first wait at most; it doubles with each try."""

_draw = random.Random()  # of its own: the global stream belongs to the run, and is in its checkpoints


class NoAnswer(Exception):
    """A try that brought nothing. tries: give up after so many; retry_after_s: the server asked to wait; alive: it answered sensibly.

    absent: nothing listens at the address. late: its time was over before the answer was there.
    """

    def __init__(
        self,
        message: str,
        *,
        tries: float = math.inf,
        retry_after_s: float = 0.0,
        alive: bool = False,
        absent: bool = False,
        late: bool = False,
    ) -> None:
        super().__init__(message)
        self.tries, self.retry_after_s, self.alive, self.absent, self.late = tries, retry_after_s, alive, absent, late


class Patience:
    """The seconds of each try of one request. They double after a try that was late, so that a slow server's answer comes in the end.

    With the same seconds for each try, a server that needs longer would do the same work again and again, and its answers be thrown away.

    Args:
        first: Seconds of the first try.
        until: The deadline of all tries (`time.monotonic`).
    """

    def __init__(self, first: float, until: float) -> None:
        self.first, self.until, self.late = first, until, 0

    @contextmanager
    def try_once(self) -> Iterator[float]:
        """The seconds of the try that the block makes."""
        try:
            yield max(min(self.first * 2**self.late, self.until - time.monotonic()), 0.001)
        except NoAnswer as error:
            self.late += error.late
            raise


class Reply(NamedTuple):
    """An answer of a server. wait: seconds that its Retry-After asks for."""

    status: int
    body: bytes
    wait: float


async def retried(attempt: Callable[[int], Awaitable[T]], *, until: float, max_wait_s: float) -> T:
    """The first answer of `attempt(1)`, `attempt(2)`, ...; raises the last NoAnswer.

    Between two tries it waits as long as the server asked, and on top of that Uniform(0, min(max_wait_s, 0.1 * 2^(try - 1))) seconds.
    A wait that would end at `until` (`time.monotonic`) or later is not begun.
    """
    for tries in itertools.count(1):
        try:
            return await attempt(tries)
        except NoAnswer as error:
            pause = error.retry_after_s + _draw.uniform(0, min(max_wait_s, FIRST_WAIT * 2 ** min(tries - 1, 60)))
            if tries >= error.tries or time.monotonic() + pause >= until:
                raise
        await asyncio.sleep(pause)
    raise AssertionError("itertools.count has no end")


def refusal(message: str, *, status: int, wait: float) -> NoAnswer:
    """The failure that a status other than 200 is: until the deadline what passes, 500 once more, anything else not again."""
    tries = math.inf if status in PASSING else 2 if status == 500 else 1
    return NoAnswer(message, tries=tries, retry_after_s=wait, alive=status not in OUTAGE, late=status == TOO_LATE)


def bearer(variable: str) -> dict[str, str]:
    """The header with the token that a variable of the environment holds, if it holds one."""
    token = token_from_environment(variable)
    return {"Authorization": f"Bearer {token}"} if token else {}


def open_session(*, token_env: str, connector: aiohttp.BaseConnector) -> aiohttp.ClientSession:
    """A session whose answers `exchange` can bound: no server may compress them."""
    import aiohttp

    return aiohttp.ClientSession(connector=connector, headers={"Accept-Encoding": "identity"} | bearer(token_env), auto_decompress=False)


async def exchange(
    session: aiohttp.ClientSession,
    url: str,
    *,
    name: str,
    seconds: float,
    limit: int,
    knob: str = "timeout_s",
    body: IO[bytes] | None,
    headers: Mapping[str, str],
) -> Reply:
    """POST a body, or GET where there is none. Raises NoAnswer for a connection that fails, takes `seconds`, or brings over `limit` bytes.

    name: The server, for messages; knob: the option that sets `seconds`.
    """
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=seconds, sock_connect=min(seconds, CONNECT_SECONDS))
    method = "GET" if body is None else "POST"
    try:
        async with session.request(method, url, data=body, headers=headers, timeout=timeout, allow_redirects=False) as response:
            return Reply(response.status, await read_answer(response, limit), retry_after(response.headers.get("Retry-After")))
    except TooMuch as error:
        raise NoAnswer(f"{name}: {error}", tries=UNREADABLE_TRIES) from error
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        late = isinstance(error, TimeoutError)
        why = f"no answer in {seconds:.3g} s (see {knob})" if late else f"{type(error).__name__} {error}"
        raise NoAnswer(f"{name}: {why}", absent=isinstance(error, aiohttp.ClientConnectorError), late=late) from error


async def health(session: aiohttp.ClientSession, url: str) -> int | str:
    """The status of GET /health, or why there is none."""
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=HEALTH_SECONDS)
    try:
        async with session.get(f"{url}/health", timeout=timeout, allow_redirects=False) as response:
            return response.status
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        return f"{type(error).__name__} {error}"
