"""Servers on the GPUs that train are awake when they are asked, and asleep at all other times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from fake_server import FakeServer
from test_http import LORA, SHORT, engine, loaded, pushed, requests

from lit_rl.errors import ConfigError
from lit_rl.rollouts.base import RolloutError
from lit_rl.rollouts.colocated import ColocatedEngine

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
