"""The retry core that the clients of reward and inference servers share."""

import asyncio
import math
import random
import time

import pytest

from lit_rl.net import retry
from lit_rl.net.retry import NoAnswer, Patience, refusal, retried


def failing(*failures: NoAnswer) -> tuple[list[int], object]:
    """An attempt that fails as told and then answers its number, and the numbers it was called with."""
    numbers: list[int] = []

    async def attempt(number: int) -> int:
        numbers.append(number)
        if number <= len(failures):
            raise failures[number - 1]
        return number

    return numbers, attempt


def run(attempt: object, *, seconds: float = 60.0) -> int:
    return asyncio.run(retried(attempt, until=time.monotonic() + seconds, max_wait_s=0.01))


@pytest.mark.parametrize(
    ("status", "tries", "alive"),
    [(408, math.inf, True), (429, math.inf, True), (502, math.inf, False), (503, math.inf, False), (500, 2, True), (400, 1, True)],
)
def test_a_status_says_how_often_to_ask_again(status: int, tries: float, alive: bool) -> None:
    error = refusal("no", status=status, wait=1.5)
    assert (error.tries, error.alive, error.retry_after_s) == (tries, alive, 1.5)


def test_passing_failures_are_tried_again_and_numbered() -> None:
    numbers, attempt = failing(NoAnswer("a"), NoAnswer("b"))
    assert run(attempt) == 3 and numbers == [1, 2, 3]


@pytest.mark.parametrize("tries", [0, 1, 2, 3])
def test_a_lasting_failure_ends_after_its_tries_with_the_last_reason(tries: int) -> None:
    numbers, attempt = failing(*(NoAnswer(f"failure {i}", tries=tries) for i in range(1, 10)))
    with pytest.raises(NoAnswer, match=f"failure {max(tries, 1)}$"):
        run(attempt)
    assert len(numbers) == max(tries, 1)


def test_a_wait_that_would_end_after_the_deadline_is_not_begun() -> None:
    numbers, attempt = failing(NoAnswer("busy", retry_after_s=3600.0))
    began = time.monotonic()
    with pytest.raises(NoAnswer, match="busy"):
        run(attempt, seconds=30.0)
    assert numbers == [1] and time.monotonic() - began < 25.0


def test_waits_double_up_to_their_limit_above_what_the_server_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the draw at its upper end: 0.1, 0.2, 0.4, ... 5; the second failure asks for a second more."""
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(retry.asyncio, "sleep", sleep)
    monkeypatch.setattr(retry._draw, "uniform", lambda low, high: high)
    _, attempt = failing(*(NoAnswer("x", retry_after_s=float(i == 1)) for i in range(8)))
    assert asyncio.run(retried(attempt, until=math.inf, max_wait_s=5.0)) == 9
    assert waits == pytest.approx([0.1, 1.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0])


def test_waits_leave_the_global_random_stream_alone() -> None:
    """It belongs to the run, which could not be resumed exactly if a busy server moved it."""
    before = random.getstate()
    run(failing(NoAnswer("a"))[1])
    assert random.getstate() == before


def test_tries_last_twice_as_long_after_a_late_one_and_never_beyond_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deadline 100: 30, a failure that was not late, 30 again, 60; the next one has all of the 10 that are left, and then none are."""
    now = 0.0
    monkeypatch.setattr(retry.time, "monotonic", lambda: now)
    patience, told = Patience(30.0, 100.0), []
    for late in (False, True, True, True, True):
        with pytest.raises(NoAnswer), patience.try_once() as seconds:
            told.append(seconds)
            now += seconds * late
            raise NoAnswer("no", late=late)
    assert told == [30.0, 30.0, 60.0, 10.0, 0.001]
