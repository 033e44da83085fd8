"""Servers on the GPUs that train are awake when they are asked, and asleep at all other times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from digit_world import agent, digit_tasks
from fake_server import FakeServer
from rollouts.vllm_agent import Seen
from test_http import LORA, SHORT, engine, loaded, pushed, requests
from toy_text import trainer

from lit_rl.errors import ConfigError
from lit_rl.rollouts.answers import Answers
from lit_rl.rollouts.base import RolloutEngine, RolloutError, Sampling
from lit_rl.rollouts.colocated import ColocatedEngine
from lit_rl.rollouts.hf import HFEngine

SETTINGS: dict[str, Any] = {"timeout_s": 5.0, "deadline_s": 10.0, "health_s": 5.0, "probe_tolerance": 1e-4}


class SleepyServer(FakeServer):
    """Says when it was woken up and sent to sleep; what it is asked while it sleeps is an error."""

    def routes(self) -> list[web.RouteDef]:
        self.turned: list[str] = []
        return super().routes()

    async def _sleep(self, request: web.Request) -> web.Response:
        self.turned.append(f"sleep {request.query['level']}")
        return await super()._sleep(request)

    async def _wake_up(self, request: web.Request) -> web.Response:
        self.turned.append("wake")
        return await super()._wake_up(request)

    async def answer(self, *args: Any, **kwargs: Any) -> web.StreamResponse:
        return web.Response(status=400, text="asleep") if self.sleeping else await super().answer(*args, **kwargs)


class WithoutSleep(FakeServer):
    """It was started without development mode."""

    async def _wake_up(self, request: web.Request) -> web.Response:
        return await self._nowhere(request)


def test_it_sleeps_between_rollouts_and_answers_as_a_server_that_never_does(base: Path, tmp_path: Path) -> None:
    answering = loaded(base, LORA, shift=0.1)
    with FakeServer(base) as server:
        expected = pushed(server, tmp_path / "a", answering).generate(requests(answering), SHORT)
    with SleepyServer(base) as server:
        made = ColocatedEngine(server.url, str(tmp_path / "b"), **SETTINGS)
        made.setup(answering, rank=0, world_size=1)
        for version in range(2):
            made.update_weights(version)
            assert not server.sleeping
            assert [s.ids for s in made.generate(requests(answering), SHORT)] == [s.ids for s in expected]
            assert server.sleeping and server.turned[3 * version :] == ["wake", "wake", "sleep 1"]
        made.close()


class Watched(Seen):
    """Episodes of a run, and whether the server slept when each of them were told and when each micro-batch was trained on."""

    def __init__(self, server: SleepyServer) -> None:
        super().__init__()
        self.server, self.asleep = server, []

    def on_trajectories(self, trainer: Any, module: Any, trajectories: Any) -> None:
        super().on_trajectories(trainer, module, trajectories)
        self.asleep.append(self.server.sleeping)

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.asleep.append(self.server.sleeping)


def test_episodes_of_agents_keep_it_awake_and_training_finds_it_asleep(base: Path, tmp_path: Path) -> None:
    """Two iterations and two evaluations. The first episodes are those of an engine in this process."""
    short = Sampling(max_new_tokens=2)

    def play(engine: RolloutEngine, seen: Seen, iterations: int) -> list[list[str]]:
        made = agent(base, answers=Answers(engine=engine, sampling=short, eval_sampling=short))
        fit = trainer(max_epochs=iterations, check_val_every_n_epoch=1, callbacks=[seen], limit_val_batches=int(iterations > 1))
        fit.fit(made, datamodule=digit_tasks(tmp_path))
        assert all(episode.status.counts for episode in seen.episodes)
        return [[turn.text for turn in episode.turns] for episode in seen.episodes[:64]]

    with SleepyServer(base) as server:
        watched = Watched(server)
        told = play(ColocatedEngine(server.url, str(tmp_path / "sync"), **SETTINGS), watched, 2)
        assert len(watched.episodes) == 2 * (64 + 8) and all(watched.asleep) and len(watched.asleep) > 4
        assert server.turned[-2:] == ["wake", "sleep 1"] and server.turned.count("sleep 1") == 4
    assert told == play(HFEngine(), Seen(), 1)


def test_what_it_cannot_do_is_told(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="engine.dialect"):
        ColocatedEngine("localhost:1", str(tmp_path), dialect="sglang")
    answering = loaded(base, LORA)
    with WithoutSleep(base) as server:
        made = ColocatedEngine(server.url, str(tmp_path), **SETTINGS)
        made.setup(answering, rank=0, world_size=1)
        with pytest.raises(RolloutError, match="--enable-sleep-mode"):
            made.update_weights(0)
        with pytest.raises(ConfigError, match="asynchronous"):
            made.begin(requests(answering), SHORT)
        assert engine(server, tmp_path).has_copy
