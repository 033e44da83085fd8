"""Judges are awake while they are asked, and asleep while the policy trains; a server that cannot sleep is told at the start."""

from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from rewards.fault_proxy import LocalServer
from toy import ToyData, toy_method, toy_trainer

from callbacks.base import RLCallback
from callbacks.judge_sleep import JudgeSleep
from lit_rl.errors import ConfigError


class Sleeping(LocalServer):
    """vLLM's routes of sleeping. statuses: those of the first answers to POST; lacking: it has no such routes."""

    def __init__(self, *statuses: int, lacking: bool = False) -> None:
        super().__init__()
        self.statuses, self.lacking, self.asleep = list(statuses), lacking, False
        self.said: list[str] = []

    def routes(self) -> list[web.RouteDef]:
        if self.lacking:
            return [web.get("/v1/models", self._state)]
        return [web.get("/is_sleeping", self._state), web.post("/sleep", self._sleep), web.post("/wake_up", self._wake)]

    async def _state(self, _: web.Request) -> web.Response:
        return web.json_response({"is_sleeping": self.asleep})

    async def _sleep(self, request: web.Request) -> web.Response:
        return self._turn("sleep" + request.query["level"], True)

    async def _wake(self, _: web.Request) -> web.Response:
        return self._turn("wake", False)

    def _turn(self, word: str, asleep: bool) -> web.Response:
        if self.statuses and (status := self.statuses.pop(0)) != 200:
            return web.Response(status=status)
        self.asleep = asleep
        self.said.append(word)
        return web.Response()


class Watch(RLCallback):
    """What the servers do at each hook of a run."""

    def __init__(self, **servers: Sleeping) -> None:
        self.servers = servers
        self.seen: list[tuple[str, str]] = []

    def note(self, moment: str) -> None:
        self.seen.append((moment, " ".join(name for name, server in self.servers.items() if not server.asleep)))

    def on_rollout_chunk(self, *_: Any) -> None:
        self.note("rollout")

    def on_train_batch_start(self, *_: Any) -> None:
        self.note("training")

    def on_validation_batch_start(self, *_: Any) -> None:
        self.note("evaluation")


def test_each_judge_is_awake_when_it_is_asked_and_at_no_other_time(tmp_path: Path) -> None:
    with Sleeping() as reward, Sleeping() as bench:
        watch = Watch(reward=reward, bench=bench)
        sleep = JudgeSleep([reward.url], [bench.url + "/v1"])
        toy_trainer(tmp_path, callbacks=[sleep, watch], limit_val_batches=1.0).fit(toy_method(), ToyData())
    assert set(watch.seen) == {("rollout", "reward"), ("training", ""), ("evaluation", "bench")}
    assert reward.said == ["sleep1", "wake", "sleep1", "wake", "sleep1"] and bench.said == ["sleep1", "wake", "sleep1", "wake", "sleep1"]


def test_a_refusal_that_passes_is_asked_again_and_one_that_stays_ends_the_run(tmp_path: Path) -> None:
    with Sleeping(200, 503, 429) as judge:
        toy_trainer(tmp_path, callbacks=[JudgeSleep([judge.url], [])], max_epochs=1).fit(toy_method(), ToyData())
    assert judge.said == ["sleep1", "wake", "sleep1"]
    with (
        Sleeping(200, 400) as judge,
        pytest.raises(ConfigError, match=r"POST /wake_up: status 400: start it with `python -m lit_rl.judges`"),
    ):
        toy_trainer(tmp_path, callbacks=[JudgeSleep([judge.url], [])]).fit(toy_method(), ToyData())


def test_a_server_that_cannot_sleep_is_told_before_the_model_is_loaded(tmp_path: Path) -> None:
    method = toy_method()
    with Sleeping(lacking=True) as judge, pytest.raises(ConfigError, match="GET /is_sleeping: status 404, so it cannot sleep"):
        toy_trainer(tmp_path, callbacks=[JudgeSleep([], [judge.url])]).fit(method, ToyData())
    with pytest.raises(ConfigError, match="GET /is_sleeping: .*Cannot connect.*--enable-sleep-mode"):
        toy_trainer(tmp_path, callbacks=[JudgeSleep(["127.0.0.1:9"], [])]).fit(method, ToyData())
    assert not hasattr(method.policy, "network")


def test_addresses_come_from_the_environment_or_are_this_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNIFIEDREWARD_THINK_URL", "http://a:1,b:2/v1")
    monkeypatch.delenv("UNIGENBENCH_API_URL", raising=False)
    assert (sleep := JudgeSleep()).rollout == ["http://a:1", "http://b:2"] and sleep.evaluation == ["http://localhost:8000"]
    with pytest.raises(ConfigError, match="JudgeSleep has no judges"):
        JudgeSleep([], [])
    with pytest.raises(ConfigError, match="level=2: a judge that wakes up needs its weights"):
        JudgeSleep(level=2)
