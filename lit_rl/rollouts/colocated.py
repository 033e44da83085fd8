"""vLLM on the GPUs that train, which takes its memory while it answers and gives it back for training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import torch

from lit_rl.errors import ConfigError
from lit_rl.ranks import gather_objects
from lit_rl.rollouts.base import Request, RolloutError, Sample, Sampling
from lit_rl.rollouts.connection import Call
from lit_rl.rollouts.http import SYNC_DIR, HTTPEngine
from lit_rl.rollouts.vllm import VLLM


class ColocatedEngine(HTTPEngine):
    """Answers of vLLM servers that sleep while nobody asks: their weights wait in CPU memory, keys and values are let go.

    Start them with VLLM_SERVER_DEV_MODE=1 in the environment and --enable-sleep-mode, and with as much --gpu-memory-utilization as the
    phase `rollout` of `python -m lit_rl.doctor` leaves. All processes must make the same number of calls. Episodes of agents keep the
    servers awake until the last one has ended on every process.

    Args:
        kwargs: See `HTTPEngine`; `dialect` is one of vLLM's.
    """

    def __init__(self, urls: str | list[str] | None = None, sync_dir: str = SYNC_DIR, **kwargs: Any) -> None:
        super().__init__(urls, sync_dir, **kwargs)
        self._awake = False
        if not isinstance(self.dialect, VLLM):
            raise ConfigError("engine.dialect: a server that sleeps is vLLM's: set it to openai or vllm, or use HTTPEngine")

    def update_weights(self, version: int) -> None:
        """Wake the servers up and give them the present weights; they stay awake until they have answered. Collective."""
        self._turn("/wake_up")
        super().update_weights(version)

    def stream(self, chunks: Sequence[Sequence[Request]], sampling: Sampling) -> Iterator[tuple[int, list[Sample]]]:
        """(place, answers) of each chunk, after which the servers sleep. Collective."""
        with self.awake():
            yield from super().stream(chunks, sampling)

    @contextmanager
    def awake(self) -> Iterator[None]:
        """A block in which the servers are awake. After an error in it they are left so: other processes may not have come to its end."""
        self._turn("/wake_up")
        self._awake = True
        yield
        self._awake = False
        self._turn("/sleep?level=1")

    def begin(self, requests: Sequence[Request], sampling: Sampling) -> Future[list[Sample]]:
        """Ask servers that are awake. Raises ConfigError elsewhere: there is no memory for answers while the policy trains."""
        if self._awake:
            return super().begin(requests, sampling)
        raise ConfigError(
            "model.answers.asynchronous=true asks for answers while the policy trains, when ColocatedEngine's servers sleep: set it to "
            "false, or give HTTPEngine servers on GPUs of their own"
        )

    def _turn(self, route: str) -> None:
        """Have all servers follow a route, when no process asks them anything any more. Raises RolloutError on all processes."""
        gather_objects(None)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        wrong = ""
        if self.rank == 0:
            try:
                self.connection.run([Call([url], route, {}, _nothing) for url in self.urls])
            except RolloutError as error:  # the others are waiting, and end with the same sentence
                wrong = f"{error}. Start vLLM with VLLM_SERVER_DEV_MODE=1 and --enable-sleep-mode"
        if wrong := gather_objects(wrong)[0]:
            raise RolloutError(wrong)


def _nothing(_: object) -> None:
    """The answer is looked at for its status alone."""
