"""Judges on the GPUs that train: vLLM servers that are awake while they are asked, and asleep at all other times."""

from __future__ import annotations

import asyncio
import io
import json
import os
import time
from collections.abc import Callable, Coroutine, Sequence

import lightning as L
import torch

from callbacks.base import Method, RLCallback
from lit_rl.errors import ConfigError
from lit_rl.net.addresses import parse_urls
from lit_rl.net.retry import NoAnswer, exchange, open_session, refusal, retried
from lit_rl.ranks import all_or_none, gather_objects, place
from lit_rl.types import Rollout

REMEDY = "start it with `python -m lit_rl.judges`, or vLLM with VLLM_SERVER_DEV_MODE=1 and --enable-sleep-mode"
UNIFIEDREWARD, UNIGENBENCH = ("UNIFIEDREWARD_THINK_URL", 18087), ("UNIGENBENCH_API_URL", 8000)


class JudgeSleep(RLCallback):
    """Wakes judges up (POST /wake_up) before a rollout or an evaluation, and sends them to sleep (POST /sleep) after it.

    A sleeping vLLM keeps its weights in CPU memory and gives its GPU memory back. All sleep from the start of a fit. The first process
    asks and the others wait, so nobody trains while a judge still holds memory. Raises ConfigError before any model is loaded where a
    server cannot sleep, and ends the run where one does not do so later.

    Args:
        rollout: Judges that rewards ask: addresses as of a reward. By default the environment's UNIFIEDREWARD_THINK_URL, else port 18087
            of this machine; [] for none.
        evaluation: Judges that an evaluation asks. By default the environment's UNIGENBENCH_API_URL, else port 8000 of this machine; []
            for none. Name those of `rollout` again where rewards also score held-out prompts.
        level: 1 keeps the weights in CPU memory; 2 would let go of them, which a judge cannot get back by waking up alone.
        timeout_s: Seconds of one try.
        deadline_s: Seconds of one change with all its tries.
        token_env: Environment variable with a bearer token; unset = none.
    """

    def __init__(
        self,
        rollout: list[str] | None = None,
        evaluation: list[str] | None = None,
        *,
        level: int = 1,
        timeout_s: float = 60.0,
        deadline_s: float = 300.0,
        token_env: str = "JUDGE_TOKEN",
    ) -> None:
        if level != 1:
            raise ConfigError(f"JudgeSleep level={level}: a judge that wakes up needs its weights, which level 1 keeps")
        self.rollout, self.evaluation = _addresses(rollout, *UNIFIEDREWARD), _addresses(evaluation, *UNIGENBENCH)
        if not self.rollout + self.evaluation:
            raise ConfigError("JudgeSleep has no judges: name some in rollout or evaluation, or leave it out")
        self.level, self.timeout_s, self.deadline_s, self.token_env = level, timeout_s, deadline_s, token_env
        self._seconds = 0.0

    # ------------------------------------------------------------------ when
    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        """Look whether all can sleep."""
        if stage in ("fit", "validate"):
            self._first(self._check)

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Send all to sleep."""
        self._turn([*self.rollout, *self.evaluation], f"/sleep?level={self.level}")

    def on_phase_start(self, trainer: L.Trainer, module: Method, name: str) -> None:
        """Wake up the rewards' judges when sampling begins: the first images are scored before the last ones are there."""
        if name == "rollout":
            self._turn(self.rollout, "/wake_up")

    def on_rollout_end(self, trainer: L.Trainer, module: Method, rollout: Rollout) -> None:
        """Send them to sleep when everything is scored, and log how long all changes of the iteration took."""
        self._turn(self.rollout, f"/sleep?level={self.level}")
        module.rollout_metrics["time/judge_sleep"], self._seconds = self._seconds, 0.0

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Wake up the judges of evaluations."""
        self._turn(self.evaluation, "/wake_up")

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Send them to sleep."""
        self._turn(self.evaluation, f"/sleep?level={self.level}")

    # ------------------------------------------------------------------ how
    def _turn(self, urls: Sequence[str], route: str) -> None:
        """Have the first process post a route to servers while nobody asks them anything. Raises ConfigError on all processes."""
        if not urls:
            return
        started = time.perf_counter()
        gather_objects(None)  # all processes have their scores
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._first(lambda: self._post(urls, route))
        self._seconds += time.perf_counter() - started

    def _first(self, work: Callable[[], Coroutine[object, object, None]]) -> None:
        """Do something on the first process. Raises its error on all of them."""
        all_or_none(lambda: asyncio.run(work()) if place()[0] == 0 else None)

    async def _post(self, urls: Sequence[str], route: str) -> None:
        import aiohttp

        until = time.monotonic() + self.deadline_s
        async with open_session(token_env=self.token_env, connector=aiohttp.TCPConnector()) as session:

            async def one(url: str) -> None:
                async def attempt(number: int) -> None:
                    seconds = max(0.001, min(self.timeout_s, until - time.monotonic()))
                    name = f"judge {url}: POST {route}"
                    status, _, wait = await exchange(
                        session, url + route, name=name, seconds=seconds, limit=1 << 20, body=io.BytesIO(), headers={}
                    )
                    if status != 200:
                        raise refusal(f"{name}: status {status}", status=status, wait=wait)

                await retried(attempt, until=until, max_wait_s=10.0)

            try:
                await asyncio.gather(*map(one, urls))
            except NoAnswer as error:
                raise ConfigError(f"{error}: {REMEDY}") from error

    async def _check(self) -> None:
        """Raise ConfigError for a server without the routes of sleeping."""
        import aiohttp

        async with open_session(token_env=self.token_env, connector=aiohttp.TCPConnector()) as session:
            for url in [*self.rollout, *self.evaluation]:
                name = f"judge {url}: GET /is_sleeping"
                try:
                    status, body, _ = await exchange(
                        session, f"{url}/is_sleeping", name=name, seconds=5.0, limit=1 << 20, body=None, headers={}
                    )
                    known = status == 200 and isinstance(json.loads(body).get("is_sleeping"), bool)
                except (NoAnswer, ValueError, AttributeError) as error:
                    raise ConfigError(f"{error if isinstance(error, NoAnswer) else f'{name}: no such answer'}: {REMEDY}") from error
                if not known:
                    raise ConfigError(f"{name}: status {status}, so it cannot sleep: {REMEDY}")


def _addresses(given: list[str] | None, variable: str, port: int) -> list[str]:
    """Base URLs: those given, those of the environment, or a port of this machine."""
    if given == []:
        return []
    found = given if given is not None else os.environ.get(variable, "").strip(" \t\r\n,") or f"localhost:{port}"
    return [url.removesuffix("/v1") for url in parse_urls(found)]
