"""A judge over the OpenAI chat protocol: `POST /v1/chat/completions`, tried again, and never a score where there is no answer."""

from __future__ import annotations

import asyncio
import io
import json
import math
import os
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from lit_rl.errors import ConfigError
from lit_rl.net.addresses import parse_urls, servers_of_rank
from lit_rl.net.pool import Pool
from lit_rl.net.retry import UNREADABLE_TRIES, NoAnswer, Patience, exchange, refusal, retried
from lit_rl.rewards.judges.messages import Encoding, Message
from lit_rl.rewards.judges.served import check_served

CHAT = "/v1/chat/completions"
MAX_ANSWER = 1 << 22
"""Bytes of an answer; a judge that says more is not believed."""
MAX_WAIT = 10.0
"""Seconds of the longest back-off."""


@dataclass(frozen=True, kw_only=True)
class Judge:
    """A judge's address, the settings of its answers, and limits of its requests.

    Args:
        urls: `http://host:port`, bare `host:port`, or a range of ports `host:8000-8003`, several in a list or after commas; each process
            asks all of them in turn. Default: the environment variable of the reward, else its port on this machine.
        model: Name under which the server serves the judge (`--served-model-name`). Default: the reward's own.
        temperature: 0 = the most likely answer, the same each time; null = the server's default.
        max_tokens: Of an answer, thoughts included. An answer that ends there is cut off, and counts as none.
        body: Further fields of each request, e.g. {seed: 0}.
        encoding: Of pictures: `jpeg` of quality 95 without chroma subsampling; `png` and `webp` lose nothing, for small letters.
        concurrency: Requests in flight per server and process.
        timeout_s: Seconds of the first try; they double after each one that took too long.
        deadline_s: Seconds of one request with all its tries.
        breaker_after: After so many failures in a row a server is asked only for /health until it answers.
        probe_s: Seconds between two such questions.
        token_env: Environment variable with a bearer token; unset = none.
    """

    urls: str | list[str] | None = None
    model: str | None = None
    temperature: float | None = 0.0
    max_tokens: int = 4096
    body: dict[str, int | float | str | bool] = field(default_factory=dict)
    encoding: Encoding = "jpeg"
    concurrency: int = 32
    timeout_s: float = 160.0
    deadline_s: float = 600.0
    breaker_after: int = 5
    probe_s: float = 5.0
    token_env: str = "JUDGE_TOKEN"

    def __post_init__(self) -> None:
        limits = {"max_tokens": self.max_tokens, "concurrency": self.concurrency, "breaker_after": self.breaker_after}
        times = {"timeout_s": self.timeout_s, "deadline_s": self.deadline_s, "probe_s": self.probe_s}
        for name, value in {**limits, **times}.items():
            if not value > 0:
                raise ConfigError(f"judge.{name}={value} must be positive")
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            raise ConfigError(f"judge.temperature={self.temperature} must be at least 0; 0 takes the most likely answer")

    def addresses(self, *, variable: str, port: int) -> list[str]:
        """Base URLs without `/v1`: `urls`, else those that the environment variable names, else `port` on this machine."""
        given = self.urls if self.urls is not None else os.environ.get(variable, "").strip(" \t\r\n,") or f"localhost:{port}"
        try:
            return [re.sub(r"/v1(/chat/completions)?$", "", url) for url in parse_urls(given)]
        except ConfigError as error:
            source = "judge." if self.urls is not None else f"{variable} in the environment: "
            raise ConfigError(f"{source}{error}") from error


@dataclass(frozen=True)
class Reply:
    """A judge's answer. text: None where there is none, and `reason` says why; a cut-off answer is none."""

    text: str | None
    reason: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0


class JudgeClient:
    """Asks one judge, on the loop that calls it; the session is made at the first question and ends at `close`.

    Tried again until the deadline: connection errors, timeouts, 408, 429 (waiting as Retry-After says), 502-504. A body that is no answer
    is retried twice, 500 once, other statuses and answers that are cut off never.

    Args:
        judge: Its address and settings.
        variable: Environment variable that names its address where `judge.urls` does not.
        port: On this machine, where neither does.
        model: Name of the model where `judge.model` has none.
    """

    def __init__(self, judge: Judge, *, variable: str, port: int, model: str) -> None:
        self.judge, self.variable, self.model = judge, variable, judge.model or model
        self.urls = judge.addresses(variable=variable, port=port)
        self.own = self.urls
        self.last_error = ""
        self._counts = Counter(
            requests=0, retries=0, failures=0, breaker_opened=0, length_stops=0, unreadable=0, prompt_tokens=0, completion_tokens=0
        )
        self._answers, self._seconds = 0, 0.0
        self._pool: Pool | None = None

    def setup(self, *, rank: int, world_size: int) -> None:
        """Begin with this rank's server. Raises ConfigError where one does not answer, or does not serve the model."""
        self.own = servers_of_rank(self.urls, rank=rank, world_size=world_size, mapping="round_robin")
        if rank == 0:
            asyncio.run(check_served(self.urls, model=self.model, token_env=self.judge.token_env, variable=self.variable))

    async def ask(self, messages: Sequence[Message]) -> Reply:
        """One answer. Never raises for what a server does: a failure is a Reply without text."""
        pool = self._connect()
        async with pool.gate:
            patience = Patience(self.judge.timeout_s, time.monotonic() + self.judge.deadline_s)
            body = await asyncio.to_thread(self.request, messages)
            try:
                reply = await retried(partial(self._try, pool, body, patience), until=patience.until, max_wait_s=MAX_WAIT)
            except NoAnswer as error:
                reply = Reply(None, str(error))
        if reply.text is None:
            self.note_failure(reply.reason)
        self._counts["prompt_tokens"] += reply.prompt_tokens
        self._counts["completion_tokens"] += reply.completion_tokens
        return reply

    def request(self, messages: Sequence[Message]) -> bytes:
        """The body of a question."""
        own = {"temperature": self.judge.temperature} if self.judge.temperature is not None else {}
        fields = {"model": self.model, "messages": list(messages), **own, "max_tokens": self.judge.max_tokens, **self.judge.body}
        return json.dumps(fields).encode()

    def note_failure(self, reason: str) -> None:
        """Count an answer that brings no score; a reward tells those that it cannot read."""
        self._counts["failures"] += 1
        self.last_error = reason

    def note_unreadable(self, text: str, wanted: str) -> None:
        """Count an answer that came whole and says nothing that its dialect knows. wanted: The form of an answer that does."""
        self._counts["unreadable"] += 1
        self.note_failure(f"judge {self.model} did not answer {wanted}; it ended with {text[-200:]!r}")

    def counters(self) -> Mapping[str, float]:
        """requests, retries, failures, breaker_opened, length_stops, unreadable, prompt_tokens, completion_tokens."""
        return dict(self._counts)

    def averages(self) -> Mapping[str, tuple[float, float]]:
        """answer_seconds: the sum over answers, and how many there were."""
        return {"answer_seconds": (self._seconds, float(self._answers))}

    async def close(self) -> None:
        """Close the session. The next question opens a new one."""
        if self._pool is not None:
            pool, self._pool = self._pool, None
            await pool.session.close()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_pool": None}

    # -- on the loop of the caller

    def _connect(self) -> Pool:
        """One pool per loop; a fork or a restarted loop gets its own."""
        if self._pool is None or not self._pool.is_here:
            self._pool = Pool(
                self.own,
                (),
                concurrency=self.judge.concurrency,
                token_env=self.judge.token_env,
                breaker_after=self.judge.breaker_after,
                probe_s=self.judge.probe_s,
                counts=self._counts,
                kind="judge",
            )
        return self._pool

    async def _try(self, pool: Pool, body: bytes, patience: Patience, number: int) -> Reply:
        """One try. Raises NoAnswer."""
        self._counts["retries"] += number > 1

        async def send(url: str) -> Reply:
            with patience.try_once() as seconds:
                return await self._post(pool, url, body, seconds)

        return await pool.ask(send, patience_s=self.judge.deadline_s, until=patience.until)

    async def _post(self, pool: Pool, url: str, body: bytes, seconds: float) -> Reply:
        """Send, and understand the answer. Raises NoAnswer."""
        name, started = f"judge {url}", time.monotonic()
        status, answer, wait = await exchange(
            pool.session,
            url + CHAT,
            name=name,
            seconds=seconds,
            limit=MAX_ANSWER,
            knob="judge.timeout_s",
            body=io.BytesIO(body),
            headers={"Content-Type": "application/json"},
        )
        if status != 200:
            told = "".join(letter if letter.isprintable() else " " for letter in answer[:300].decode(errors="replace"))
            raise refusal(f"{name}: status {status} {told}", status=status, wait=wait)
        reply = self._read(answer, name=name)
        took = time.monotonic() - started
        self._answers, self._seconds = self._answers + 1, self._seconds + took
        return Reply(reply.text, reply.reason, reply.prompt_tokens, reply.completion_tokens, took)

    def _read(self, answer: bytes, *, name: str) -> Reply:
        """The text of the first choice. Raises NoAnswer for what is no chat completion."""
        try:
            told = json.loads(answer)
            choice, usage = told["choices"][0], told.get("usage") or {}
            finish, text = choice.get("finish_reason"), choice["message"].get("content")
            tokens = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise NoAnswer(f"{name}: the answer is no chat completion ({answer[:80]!r})", tries=UNREADABLE_TRIES) from error
        if finish == "length":
            self._counts["length_stops"] += 1
            return Reply(None, f"{name}: the answer was cut off at judge.max_tokens={self.judge.max_tokens}; raise it", *tokens)
        if not isinstance(text, str):
            raise NoAnswer(f"{name}: the answer has no text (finish_reason {finish!r})", tries=UNREADABLE_TRIES)
        return Reply(text, "", *tokens)
