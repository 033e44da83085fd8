"""Order, overlap, failures and the end of threads, with rewards in this process and behind servers that misbehave."""

import asyncio
import json
import logging
import math
import multiprocessing as mp
import os
import pickle
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from rewards.fault_proxy import Fault, FaultProxy, RedServer, red_images
from torch import Tensor

from callbacks.reward_scoring import RewardScoring
from lit_rl.errors import ConfigError
from lit_rl.rewards.base import Reward, RewardError, TextReward
from lit_rl.rewards.client import HTTPReward
from lit_rl.rewards.ocr import OCRReward
from lit_rl.rewards.pseudo import PseudoReward
from lit_rl.rewards.quotes import check_targets
from lit_rl.rewards.text.function import FunctionReward
from lit_rl.rewards.text.rules import RuleReward
from lit_rl.rewards.weights import resolve_weights
from lit_rl.types import Info


class Red(Reward):
    """Red of the first pixel; prompts starting with `raise` raise, with `inf` give infinity."""

    def __init__(self, name: str = "red", declare: bool = True) -> None:
        self.name, self.places, self.closed = name, [], 0
        if declare:
            self.outputs = [name]

    def setup(self, *, rank: int, world_size: int, device: str) -> None:
        self.places.append((rank, world_size, device))

    def score(self, media: Tensor, info: Sequence[Info]) -> Mapping[str, Tensor]:
        if any(row["prompt"].startswith("raise") for row in info):
            raise RuntimeError("no such glyph")
        reds = media[:, 0, 0, 0].float()
        return {self.name: torch.where(torch.tensor([row["prompt"].startswith("inf") for row in info]), math.inf, reds)}

    async def close(self) -> None:
        self.closed += 1


class Two(Red):
    """A reward with two scores."""

    outputs = ("similarity", "confidence")

    def __init__(self) -> None:
        super().__init__(declare=False)

    def score(self, media: Tensor, info: Sequence[Info]) -> Mapping[str, Tensor]:
        return {"similarity": media[:, 0, 0, 0], "confidence": media[:, 2, 0, 0]}


def info(count: int, text: str = "a") -> list[dict[str, str]]:
    return [{"prompt": text} for _ in range(count)]


def fake_trainer(**strategy: object) -> SimpleNamespace:
    return SimpleNamespace(world_size=1, global_rank=0, strategy=SimpleNamespace(root_device=torch.device("cpu"), **strategy))


def our_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("reward-")]


@pytest.fixture
def scoring() -> Iterator[list[RewardScoring]]:
    """Scorers put into this list are closed, and no thread of theirs may be left."""
    opened: list[RewardScoring] = []
    yield opened
    for each in opened:
        each.close()
    assert our_threads() == []


@pytest.fixture(scope="module")
def server() -> Iterator[RedServer]:
    with RedServer() as red:
        yield red


# -- scores


@pytest.mark.parametrize("seed", range(5))
def test_scores_come_in_order_of_submission(scoring: list, seed: int) -> None:
    """Whatever the order in which rewards finish."""
    draw = random.Random(seed)

    class Late(Red):
        async def score_async(self, media: Tensor, info: Sequence[Info]) -> Mapping[str, Tensor]:
            await asyncio.sleep(draw.uniform(0, 0.02))
            return self.score(media, info)

    queue = RewardScoring({"a": Late("a"), "b": Late("b")}, weights={"a": 1.0, "b": 2.0})
    scoring.append(queue)
    for _ in range(2):  # two iterations
        reds = [[draw.randrange(256) for _ in range(draw.randrange(1, 5))] for _ in range(draw.randrange(1, 9))]
        for chunk in reds:
            queue.submit(red_images(chunk), info(len(chunk)))
        scores = queue.gather()
        flat = [float(r) for chunk in reds for r in chunk]
        assert {name: (s.dtype, s.tolist()) for name, s in scores.items()} == {n: (torch.float64, flat) for n in "ab"}
    assert queue.weights == {"a": 1.0, "b": 2.0}


def test_nothing_submitted_gives_nothing(scoring: list) -> None:
    scoring.append(RewardScoring([Red()]))
    assert {name: len(s) for name, s in scoring[0].gather().items()} == {"red": 0}
    assert scoring[0].metrics()["reward/red/failed_fraction"] == 0


def test_submit_returns_before_anything_is_scored_and_chunks_overlap(scoring: list) -> None:
    """Every chunk's request is under way before the first is answered: nothing waits for its predecessor, and submit for nobody."""
    everyone, arrived = threading.Event(), []

    class Waiting(Red):
        async def score_async(self, media: Tensor, info: Sequence[Info]) -> Mapping[str, Tensor]:
            arrived.append(len(info))
            while not everyone.is_set():
                await asyncio.sleep(0.002)
            return self.score(media, info)

    queue = RewardScoring([Waiting()])
    scoring.append(queue)
    for i in range(6):
        queue.submit(red_images([i]), info(1))
    while len(arrived) < 6:
        time.sleep(0.002)
    everyone.set()
    assert queue.gather()["red"].tolist() == [0, 1, 2, 3, 4, 5]


def test_a_reward_in_this_process_sees_one_chunk_at_a_time_and_two_rewards_run_together(scoring: list) -> None:
    together = threading.Barrier(2, timeout=60)
    busy, most = {"a": 0, "b": 0}, {"a": 0, "b": 0}

    class Counting(Red):
        def score(self, media: Tensor, info: Sequence[Info]) -> Mapping[str, Tensor]:
            busy[self.name] += 1
            most[self.name] = max(most[self.name], busy[self.name])
            together.wait()  # passes only when both rewards are inside
            busy[self.name] -= 1
            return super().score(media, info)

    queue = RewardScoring([Counting("a"), Counting("b")], weights={"a": 1})
    scoring.append(queue)
    for i in range(4):
        queue.submit(red_images([i]), info(1))
    assert queue.gather()["b"].tolist() == [0, 1, 2, 3]
    assert most == {"a": 1, "b": 1}


# -- names and weights


def test_weights() -> None:
    assert resolve_weights({"r": ["x"]}, None, complete=True) == {"x": 1.0}
    assert resolve_weights({"r": ["x", "y"]}, {"y": 0.5}, complete=True) == {"x": 0.0, "y": 0.5}
    assert resolve_weights({}, {"y": 0.5}, complete=False) == {"y": 0.5}
    assert resolve_weights({"r": ["x", "y"]}, None, complete=True) == {"x": 1.0, "y": 0.0}
    assert resolve_weights({"r": ["acc", "score", "parsed"]}, None, complete=True) == {"acc": 0.0, "score": 1.0, "parsed": 0.0}


@pytest.mark.parametrize(
    ("reward", "main", "extras"),
    [
        (lambda path: FunctionReward(path, extras=["acc", "digits"]), "function", ["acc", "digits"]),
        (lambda path: FunctionReward(path, name="right", extras=["acc"]), "right", ["acc"]),
        (lambda path: RuleReward(), "score", ["acc", "parsed"]),
        (lambda path: Two(), "similarity", ["confidence"]),
        (lambda path: OCRReward(), "ocr_similarity", ["ocr_confidence"]),
        (lambda path: HTTPReward("127.0.0.1:1", ["vlm_score", "ocr_similarity"]), "vlm_score", ["ocr_similarity"]),
        (lambda path: HTTPReward("127.0.0.1:1", {"clip": "clip_score", "text": "ocr_similarity"}), "clip", ["text"]),
    ],
)
def test_without_weights_the_main_score_of_a_reward_counts(reward: Callable, main: str, extras: list[str], tmp_path: Path) -> None:
    (tmp_path / "f.py").write_text("def compute_score(**row): return 1")
    assert RewardScoring([reward(str(tmp_path / "f.py"))]).weights == {main: 1.0} | dict.fromkeys(extras, 0.0)


def test_the_main_score_of_a_reward_that_declares_nothing_is_the_first_that_it_answers(scoring: list) -> None:
    class Undeclared(Two):
        outputs = ()

    scoring.append(queue := RewardScoring([Undeclared()]))
    queue.submit(red_images([3]), info(1))
    assert queue.gather()["similarity"].tolist() == [3] and queue.weights == {"similarity": 1.0, "confidence": 0.0}


@pytest.mark.parametrize(
    ("rewards", "options", "message"),
    [
        ({"ocr": Red(), "vlm": Red()}, {}, "rewards ocr and vlm both give a score named red"),
        ([Two(), Red()], {}, r"2 rewards give 3 scores, .*; set weights .*e.g. {'similarity': 1.0, 'red': 1.0}"),
        ([Two()], {"weights": {"similarty": 1.0}}, r"weights name \['similarty'\].*; did you mean similarity\?"),
        ([Red()], {"weights": {"blue": 1.0}}, r"weights name \['blue'\], but the rewards give \['red'\]"),
        ([Red()], {"weights": {"red": 0.0}}, "not all zero"),
        ([Red()], {"weights": {"red": math.nan}}, "finite"),
        ([Red()], {"max_failed_fraction": 5}, r"must lie in \[0, 1\]"),
        ([], {}, "rewards is empty"),
    ],
)
def test_wrong_settings_are_told_before_anything_runs(rewards: object, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RewardScoring(rewards, **options)


def test_names_that_are_not_declared_are_checked_at_the_first_gather(scoring: list) -> None:
    queue = RewardScoring([Red(declare=False)], weights={"blue": 1.0})
    scoring.append(queue)
    queue.submit(red_images([1]), info(1))
    with pytest.raises(RewardError, match=r"weights name \['blue'\], but the rewards give \['red'\]"):
        queue.gather()


def test_rewards_without_a_label_are_called_by_their_class() -> None:
    assert list(RewardScoring([Red("a"), Red("b"), Two()], weights={"a": 1}).rewards) == ["Red_0", "Red_1", "Two"]


# -- failures


def test_a_chunk_that_raises_is_nan_and_logged_once(scoring: list, caplog: pytest.LogCaptureFixture) -> None:
    queue = RewardScoring({"ocr": Red(), "other": Red("other")}, weights={"red": 1}, max_failed_fraction=0.5)
    scoring.append(queue)
    with caplog.at_level(logging.WARNING):
        for text in ("a", "raise", "a", "raise"):
            queue.submit(red_images([7, 8]), info(2, text) if text == "a" else [{"prompt": text}, {"prompt": "a"}])
        # `other` raises too, but has no weight: it may fail
        scores = queue.gather()
    assert scores["red"].tolist() == pytest.approx([7, 8, math.nan, math.nan] * 2, nan_ok=True)
    logged = [r.message for r in caplog.records if "left samples without a score" in r.message]
    assert len(logged) == 2 and "reward ocr" in logged[0] and "RuntimeError: no such glyph" in logged[0]
    assert queue.metrics()["reward/red/failed_fraction"] == 0.5


def test_too_many_failures_stop_the_run(scoring: list) -> None:
    queue = RewardScoring({"ocr": Red()}, max_failed_fraction=0.2)
    scoring.append(queue)
    for text in ("raise", "a", "a", "a", "a"):
        queue.submit(red_images([1]), info(1, text))
    assert queue.gather()["red"].isnan().sum() == 1  # exactly the allowed fraction
    for text in ("raise", "raise", "a", "a", "a"):
        queue.submit(red_images([1]), info(1, text))
    with pytest.raises(
        RewardError, match=r"2 of 5 samples got no score.*max_failed_fraction=0\.2.*ocr: RuntimeError: no such glyph.*deadline_s"
    ):
        queue.gather()
    queue.submit(red_images([3]), info(1))
    assert queue.gather()["red"].tolist() == [3]


def test_scores_without_a_weight_may_fail(scoring: list) -> None:
    class Unsure(Two):
        def score(self, media: Tensor, info: Sequence[Info]) -> Mapping[str, Tensor]:
            return {**super().score(media, info), "confidence": torch.full((len(info),), math.nan)}

    queue = RewardScoring([Unsure()], weights={"similarity": 1.0}, max_failed_fraction=0.0)
    scoring.append(queue)
    queue.submit(red_images([1, 2]), info(2))
    assert queue.gather()["confidence"].isnan().all()
    assert queue.metrics()["reward/confidence/failed_fraction"] == 1.0


def test_infinity_is_no_score(scoring: list) -> None:
    queue = RewardScoring([Red()], max_failed_fraction=0.5)
    scoring.append(queue)
    queue.submit(red_images([1, 2]), [{"prompt": "inf"}, {"prompt": "a"}])
    assert queue.gather()["red"].tolist() == pytest.approx([math.nan, 2], nan_ok=True)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"red": torch.zeros(3)}, r"reward ocr \(Broken\) answered red of shape \(3,\) for 2 samples"),
        ({"red": torch.zeros(2, 1)}, r"shape \(2, 1\) for 2 samples"),
        ({"green": torch.zeros(2)}, r"answered the scores \['green'\] instead of \['red'\]"),
        ([1.0, 2.0], "'list' object has no attribute 'items'"),
    ],
)
def test_a_reward_that_breaks_its_contract_stops_the_run(scoring: list, answer: object, message: str) -> None:
    class Broken(Red):
        def score(self, media: Tensor, info: Sequence[Info]) -> Mapping[str, Tensor]:
            return answer

    queue = RewardScoring({"ocr": Broken()}, max_failed_fraction=1.0)
    scoring.append(queue)
    queue.submit(red_images([1, 2]), info(2))
    with pytest.raises(RewardError, match=message):
        queue.gather()


@pytest.mark.parametrize(
    ("media", "rows", "message"),
    [
        (torch.zeros(1, 3, 2, 2), 1, "uint8 B 3 H W"),
        (red_images([1]).permute(0, 2, 3, 1), 1, "uint8 B 3 H W"),
        (red_images([1]), 2, "1 samples and 2 prompts"),
    ],
)
def test_submit_refuses_what_is_not_a_chunk(media: Tensor, rows: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardScoring([Red()]).submit(media, info(rows))


def test_texts_go_to_rewards_that_read(scoring: list, monkeypatch: pytest.MonkeyPatch) -> None:
    class Length(TextReward):
        outputs = ("length",)

        def score(self, media: Sequence[str], info: Sequence[Info]) -> Mapping[str, Tensor]:
            return {"length": torch.tensor([float(len(text)) for text in media])}

    scoring.append(queue := RewardScoring({"length": Length()}))
    queue.submit(["a", "bcd"], info(2))
    assert queue.gather()["length"].tolist() == [1.0, 3.0]
    with pytest.raises(RewardError, match="makes images, which reward length does not score"):
        queue.submit(red_images([1]), info(1))
    with pytest.raises(RewardError, match="makes texts, which reward Red does not score"):
        RewardScoring([Red()]).submit(["a"], info(1))


def test_a_dry_run_scores_texts_too(scoring: list) -> None:
    scoring.append(queue := RewardScoring([PseudoReward()]))
    queue.submit(["a", "b", "a"], info(3))
    first, second, again = queue.gather()["pseudo"].tolist()
    assert first == again != second and 0 <= first < 1


# -- life


def test_close_cancels_what_is_under_way_and_submit_starts_again(scoring: list) -> None:
    started, cancelled = threading.Event(), threading.Event()

    class Endless(Red):
        patient = True

        async def score_async(self, media: Tensor, info: Sequence[Info]) -> Mapping[str, Tensor]:
            started.set()
            try:
                await asyncio.sleep(3600 if self.patient else 0)
            finally:
                cancelled.set()
            return self.score(media, info)

    reward = Endless()
    queue = RewardScoring([reward])
    queue.submit(red_images([1]), info(1))
    assert started.wait(60) and our_threads() == ["reward-scoring"]
    queue.on_exception(fake_trainer(), SimpleNamespace(), RuntimeError("a crash"))
    queue.teardown(fake_trainer(), SimpleNamespace(), "fit")
    assert cancelled.wait(60) and our_threads() == [] and reward.closed == 1
    reward.patient = False
    queue.submit(red_images([2]), info(1))
    assert queue.gather()["red"].tolist() == [2]  # the cancelled chunk does not come back
    scoring.append(queue)


def _in_fork(queue: RewardScoring, channel: mp.connection.Connection) -> None:
    queue.submit(red_images([9]), info(1))
    channel.send(queue.gather()["red"].tolist())
    queue.close()


def test_forked_and_pickled_scorers_start_afresh(scoring: list) -> None:
    queue = RewardScoring([Red()])
    scoring.append(queue)
    queue.submit(red_images([1]), info(1))
    ours, theirs = mp.Pipe()
    child = mp.get_context("fork").Process(target=_in_fork, args=(queue, theirs))
    child.start()
    assert ours.poll(30) and ours.recv() == [9]
    child.join(60)
    assert child.exitcode == 0
    copy = pickle.loads(pickle.dumps(queue))
    scoring.append(copy)
    copy.submit(red_images([4]), info(1))
    assert copy.gather()["red"].tolist() == [4]
    assert queue.gather()["red"].tolist() == [1]


def test_setup_gives_the_module_its_scorer_and_rewards_their_place() -> None:
    reward, module = Red(), SimpleNamespace()
    queue = RewardScoring([reward])
    queue.setup(fake_trainer(), module, "predict")
    assert module.reward_queue is queue and reward.places == []  # rendering needs no reward server
    queue.setup(fake_trainer(), module, "fit")
    assert reward.places == [(0, 1, "cpu")]


def test_an_unreachable_server_stops_setup() -> None:
    with pytest.raises(ConfigError, match="no reward server answers at"):
        RewardScoring([HTTPReward(RedServer().url, ["red"])]).setup(fake_trainer(), SimpleNamespace(), "fit")


def test_debug_mode_needs_no_server(scoring: list, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Guide: DISABLE_RL_REWARD_MODEL=true trains without a server. Same names and weights, scores in [0, 1) that depend on the image."""
    queue = RewardScoring(
        {"http": HTTPReward(RedServer().url, ["vlm_score"]), "own": Red(declare=False)}, weights={"vlm_score": 1, "red": 2}
    )
    scoring.append(queue)
    monkeypatch.setenv("DISABLE_RL_REWARD_MODEL", "true")
    with caplog.at_level(logging.WARNING):
        queue.setup(fake_trainer(), SimpleNamespace(), "fit")
    assert "NO REWARD MODEL IS ASKED" in caplog.text
    queue.submit(red_images([1, 2, 1]), info(3))
    scores = queue.gather()
    assert list(scores) == ["vlm_score", "red"] and queue.weights == {"vlm_score": 1, "red": 2}
    for values in scores.values():
        assert ((values >= 0) & (values < 1)).all() and len(set(values.tolist())) > 1
    for value, why in {
        "false": "no reward server",
        " N\n": "no reward server",
        "maybe": "DISABLE_RL_REWARD_MODEL=maybe .* neither",
    }.items():
        monkeypatch.setenv("DISABLE_RL_REWARD_MODEL", value)
        with pytest.raises(ConfigError, match=why):
            queue.setup(fake_trainer(), SimpleNamespace(), "fit")


def test_yaml_with_labels_and_with_a_list() -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--scoring", type=RewardScoring)
    reward = {"class_path": "lit_rl.rewards.client.HTTPReward", "init_args": {"urls": "127.0.0.1:8000", "outputs": ["ocr_similarity"]}}
    for rewards in ({"ocr": reward}, [reward]):
        spec = {
            "class_path": "callbacks.reward_scoring.RewardScoring",
            "init_args": {"rewards": rewards, "weights": {"ocr_similarity": 1.0}},
        }
        queue = parser.instantiate_classes(parser.parse_args([f"--scoring={json.dumps(spec)}"])).scoring
        assert isinstance(next(iter(queue.rewards.values())), HTTPReward)


# -- the whole way: a loop like training, through faults


def iterate(queue: RewardScoring, reds: list[list[int]]) -> Tensor:
    for chunk in reds:
        queue.submit(red_images(chunk), info(len(chunk)))
    return queue.gather()["red"]


def test_training_goes_on_through_faults(scoring: list, server: RedServer) -> None:
    """30 iterations x 8 requests; a third of all requests meets a fault. Each score is right or NaN; the counts say what happened."""
    draw = random.Random(0)
    kinds = [
        Fault("drop"),
        Fault("cut"),
        Fault("garbage"),
        Fault("short"),
        Fault("slow", seconds=0.02),
        *(Fault("status", s) for s in (400, 429, 500, 503)),
    ]
    plan = [draw.choice(kinds) if draw.random() < 1 / 3 else Fault("ok") for _ in range(2000)]
    with FaultProxy(server.url, plan) as proxy:
        queue = RewardScoring({"judge": HTTPReward(proxy.url, ["red"], samples_per_request=2, probe_s=0.05)}, max_failed_fraction=0.9)
        scoring.append(queue)
        lost, requests = 0, 0
        for _ in range(30):
            reds = [[draw.randrange(256) for _ in range(4)] for _ in range(4)]
            scores, metrics = iterate(queue, reds), queue.metrics()
            truth = torch.tensor([r / 255 for chunk in reds for r in chunk], dtype=torch.float64)
            assert (scores.isnan() | (scores == truth)).all()
            assert metrics["reward/red/failed_fraction"] == scores.isnan().double().mean()
            lost += int(scores.isnan().sum())
        requests = len(proxy.posts)
        assert metrics["reward/judge/failures"] == lost
        assert metrics["reward/judge/requests"] == requests and metrics["reward/judge/retries"] == requests - 30 * 8
        refused = sum(f == Fault("status", 400) for f in plan[:requests])
        assert lost >= 2 * refused > 0  # a request that the server refuses is not repeated


def test_training_survives_a_server_that_is_killed_and_restarted(scoring: list, server: RedServer) -> None:
    proxy = FaultProxy(server.url, (Fault("slow", seconds=0.01) for _ in range(10_000))).start()
    queue = RewardScoring([HTTPReward(proxy.url, ["red"], samples_per_request=1, concurrency=2, breaker_after=2, probe_s=0.05)])
    scoring.append(queue)
    restarted = threading.Event()

    def kill_and_restart() -> None:
        while len(proxy.posts) < 30:
            time.sleep(0.002)
        proxy.stop()
        time.sleep(0.3)
        proxy.start()
        restarted.set()

    killer = threading.Thread(target=kill_and_restart)
    killer.start()
    iterations = 0
    while not restarted.is_set() or iterations < 10:
        assert iterate(queue, [[i, i + 1] for i in range(5)]).tolist() == [r / 255 for i in range(5) for r in (i, i + 1)]
        iterations += 1
    killer.join()
    proxy.stop()
    metrics = queue.metrics()
    assert metrics["reward/HTTPReward/breaker_opened"] >= 1 and metrics["reward/HTTPReward/retries"] >= 2
    assert metrics["reward/HTTPReward/failures"] == 0


def test_a_server_that_stays_dead_stops_the_run_with_one_sentence(scoring: list) -> None:
    url = RedServer().url
    queue = RewardScoring({"judge": HTTPReward(url, ["red"], deadline_s=0.5, probe_s=0.1)})
    scoring.append(queue)
    with pytest.raises(RewardError, match=rf"4 of 4 samples got no score.*judge: reward server {url}.*deadline_s") as raised:
        iterate(queue, [[1, 2], [3, 4]])
    assert "\n" not in str(raised.value)


def start_server(port: int, ready: Path) -> subprocess.Popen[bytes]:
    """The project's own server with the pseudo reward."""
    command = [sys.executable, "-m", "lit_rl.rewards.server", "--port", str(port), "--scorers", "pseudo", "--ready-file", str(ready)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.mark.slow
def test_our_server_killed_and_started_again_costs_no_score(scoring: list, tmp_path: Path) -> None:
    """SIGKILL in the middle of an iteration; the server that takes the port over answers the rest, as the first would have."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = start_server(port, tmp_path / "ready")
    try:
        queue = RewardScoring([HTTPReward(f"127.0.0.1:{port}", ["pseudo"], samples_per_request=1, concurrency=1, probe_s=0.1)])
        scoring.append(queue)
        while not (tmp_path / "ready").exists():
            assert server.poll() is None, "the server did not start"
            time.sleep(0.05)
        queue.setup(fake_trainer(), SimpleNamespace(), "fit")
        media = torch.arange(200 * 3 * 32 * 32).remainder(251).to(torch.uint8).reshape(200, 3, 32, 32)
        for chunk in media.split(50):
            queue.submit(chunk, info(50))
        server.kill()
        server.wait()
        server = start_server(port, tmp_path / "again")
        assert queue.gather()["pseudo"].tolist() == pytest.approx(PseudoReward().score(media, info(200))["pseudo"].tolist())
        assert queue.metrics()["reward/HTTPReward/retries"] >= 1
    finally:
        server.kill()
        server.wait()


# -- under Lightning


class Loop(L.LightningModule):
    """Submits and gathers once per step, as a method does once per iteration."""

    def __init__(self, crash: bool = False) -> None:
        super().__init__()
        self.weight, self.crash, self.seen = torch.nn.Parameter(torch.zeros(())), crash, []

    def train_dataloader(self) -> list[int]:
        return [1, 2, 3]

    def training_step(self, batch: int, batch_idx: int) -> Tensor:
        self.reward_queue.submit(red_images([batch]), info(1))
        if self.crash:
            raise RuntimeError("a crash between submit and gather")
        self.seen += self.reward_queue.gather()["red"].tolist()
        return self.weight

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("crash", [False, True])
def test_no_thread_is_left_after_fit(crash: bool) -> None:
    reward, module = Red(), Loop(crash)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", devices=1, callbacks=[RewardScoring([reward])], **quiet)
    if crash:
        with pytest.raises(RuntimeError, match="a crash"):
            trainer.fit(module)
    else:
        trainer.fit(module)
        assert module.seen == [1, 2, 3]
    assert our_threads() == [] and reward.closed == 1 and reward.places == [(0, 1, "cpu")]


# -- several ranks


def _rank(rank: int, port: int, channel: mp.connection.Connection) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    from lightning.pytorch.strategies import DDPStrategy

    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    strategy = DDPStrategy()
    trainer = SimpleNamespace(
        world_size=2,
        global_rank=rank,
        strategy=SimpleNamespace(root_device=torch.device("cpu"), all_gather=strategy.all_gather, broadcast=strategy.broadcast),
    )
    said = []

    def attempt(queue: RewardScoring, *texts: str) -> None:
        for text in texts:
            queue.submit(red_images([rank]), info(1, text))
        try:
            said.append(queue.gather()["red"].tolist())
            said.append(queue.metrics()["reward/red/failed_fraction"])
        except RewardError as error:
            said.append(str(error))

    queue = RewardScoring([Red()], max_failed_fraction=0.25)
    queue.setup(trainer, SimpleNamespace(), "fit")
    attempt(queue, *(["raise", "a"] if rank == 1 else ["a", "a"]))  # 1 of 4: allowed
    attempt(queue, *(["raise", "raise"] if rank == 1 else ["a", "a"]))  # 2 of 4: both stop
    queue.close()
    picky = RewardScoring([Picky()])
    try:
        picky.setup(trainer, SimpleNamespace(), "fit")
    except ConfigError as error:
        said.append(str(error))
    channel.send(said)
    torch.distributed.destroy_process_group()


class Picky(Red):
    """Starts on rank 1 only."""

    def setup(self, *, rank: int, world_size: int, device: str) -> None:
        if rank == 0:
            raise ConfigError("no judge for rank 0")


def test_two_ranks_share_counts_and_stop_together() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes = [mp.Pipe() for _ in range(2)]
    ranks = [mp.get_context("fork").Process(target=_rank, args=(rank, port, pipes[rank][1])) for rank in range(2)]
    for process in ranks:
        process.start()
    try:
        said = [pipe.recv() if pipe.poll(60) else "silence" for pipe, _ in pipes]
    finally:
        for process in ranks:
            process.join(60)
            process.kill()
    assert [s[0] for s in said] == [[0, 0], pytest.approx([math.nan, 1], nan_ok=True)]
    assert [s[1] for s in said] == [0.25, 0.25]
    assert said[0][2] == said[1][2] and "2 of 4 samples got no score" in said[0][2]
    assert "rank 1: Red: RuntimeError: no such glyph" in said[0][2]
    assert said[0][3] == said[1][3] == "no judge for rank 0"


class Choosy(Two):
    """Refuses rows without a text."""

    def check(self, rows: Iterable[Info]) -> None:
        check_targets(rows)


def test_rewards_that_count_look_at_the_rows_before_they_start() -> None:
    rows = [{"prompt": "a cat", "where": "test.txt:3"}]
    trainer = fake_trainer()
    trainer.datamodule = SimpleNamespace(rows_to_score=lambda stage: iter(rows if stage == "fit" else ()))
    choosy = Choosy()
    queue = RewardScoring({"red": Red(), "choosy": choosy}, weights={"similarity": 1.0})
    with pytest.raises(ConfigError, match=r"1 prompt does not say which text.*\n.*test\.txt:3: 'a cat'"):
        queue.setup(trainer, SimpleNamespace(), "fit")
    assert not choosy.places
    server = HTTPReward("127.0.0.1:1", ["vlm_score", "ocr_similarity"])
    RewardScoring({"judge": server}, weights={"vlm_score": 1.0}).check(trainer.datamodule, "fit")
    for weights in ({"vlm_score": 1.0, "ocr_similarity": 0.1}, {"ocr_similarity": 1.0}):
        with pytest.raises(ConfigError, match="1 prompt does not say which text"):
            RewardScoring({"judge": server}, weights=weights).check(trainer.datamodule, "fit")
    queue.setup(trainer, SimpleNamespace(), "validate")
    RewardScoring({"red": Red(), "choosy": choosy}, weights={"red": 1.0}).setup(trainer, SimpleNamespace(), "fit")  # logged, no more
    assert len(choosy.places) == 2
