"""The HTTP client against a server of ours behind a proxy that injects faults."""

import asyncio
import json
import math
import pickle
import random
import socket
import threading
import time
from collections.abc import Iterator
from typing import Literal

import numpy as np
import pytest
import torch
from fault_proxy import Fault, FaultProxy, RedServer, red_images

from lit_rl.errors import ConfigError
from lit_rl.net.addresses import check_health, check_outputs, parse_urls, servers_of_rank, token_from_environment, urls_from_environment
from lit_rl.net.breaker import Breaker, ServerDown
from lit_rl.rewards.base import RewardError
from lit_rl.rewards.client import HTTPReward
from lit_rl.rewards.server import check_arguments
from lit_rl.rewards.server import parser as server_parser


@pytest.fixture(scope="module")
def server() -> Iterator[RedServer]:
    with RedServer() as red:
        yield red


def prompts(count: int, **special: str) -> list[dict[str, str]]:
    return [{"prompt": special.get(f"at{i}", f"prompt {i}")} for i in range(count)]


def expected(reds: list[int]) -> list[float]:
    return [r / 255 for r in reds]


# -- addresses


@pytest.mark.parametrize(
    ("given", "urls"),
    [
        ("127.0.0.1:8000", ["http://127.0.0.1:8000"]),
        ("http://judge/", ["http://judge"]),
        ("https://judge:1/score", ["https://judge:1"]),
        ("http://judge:1/reward/v1/score_batch", ["http://judge:1/reward"]),
        ("10.0.0.5:8000-8002", ["http://10.0.0.5:8000", "http://10.0.0.5:8001", "http://10.0.0.5:8002"]),
        (["a:1", "http://[::1]:2"], ["http://a:1", "http://[::1]:2"]),
        ("a:1, b:2 ,\n", ["http://a:1", "http://b:2"]),
        (["a:1,", " b:2 "], ["http://a:1", "http://b:2"]),
        ("::1", ["http://[::1]"]),
        ("[fe80::1]:8000-8001", ["http://[fe80::1]:8000", "http://[fe80::1]:8001"]),
        ("[::ffff:10.0.0.5]:8000", ["http://[::ffff:10.0.0.5]:8000"]),
        ("http://a:1/score, http://a:2/score", ["http://a:1", "http://a:2"]),  # as the old trainer's --reward_server_url
    ],
)
def test_addresses_are_understood(given: str | list[str], urls: list[str]) -> None:
    assert parse_urls(given) == urls


def test_addresses_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank i asks the server on port 8000 + i, and neither one nor four processes need an edit of the YAML."""
    reward = HTTPReward()
    assert reward.urls == ["http://127.0.0.1:8000"]
    assert urls_from_environment(4) == [f"127.0.0.1:{port}" for port in (8000, 8001, 8002, 8003)]
    monkeypatch.setenv("REWARD_SERVER_HOST", "10.0.0.5")
    monkeypatch.setenv("REWARD_SERVER_PORT", "9000")
    assert urls_from_environment(2) == ["10.0.0.5:9000", "10.0.0.5:9001"]
    monkeypatch.setenv("REWARD_SERVER_URLS", "a:1,b:2")
    assert HTTPReward().urls == ["http://a:1", "http://b:2"]
    monkeypatch.delenv("REWARD_SERVER_URLS")
    monkeypatch.setenv("REWARD_SERVER_PORT", "http")
    with pytest.raises(ConfigError, match="REWARD_SERVER_PORT=http"):
        HTTPReward()


@pytest.mark.parametrize(
    ("variables", "urls"),
    [
        ({"REWARD_SERVER_HOST": "::1"}, ["http://[::1]:8000", "http://[::1]:8001"]),
        ({"REWARD_SERVER_HOST": "[::1]", "REWARD_SERVER_PORT": "9000"}, ["http://[::1]:9000", "http://[::1]:9001"]),
        ({"REWARD_SERVER_HOST": " judge,\n", "REWARD_SERVER_PORT": " 9000,\n"}, ["http://judge:9000", "http://judge:9001"]),
        ({"REWARD_SERVER_HOST": "https://judge/", "REWARD_SERVER_PORT": ""}, ["https://judge:8000", "https://judge:8001"]),
        ({"REWARD_SERVER_HOST": "", "REWARD_SERVER_URLS": " , "}, ["http://127.0.0.1:8000", "http://127.0.0.1:8001"]),
        ({"REWARD_SERVER_URLS": "a:1, [::1]:2,\n"}, ["http://a:1", "http://[::1]:2"]),
    ],
)
def test_how_people_write_addresses_into_the_environment(variables: dict, urls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert parse_urls(urls_from_environment(2)) == urls


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("REWARD_SERVER_HOST", host) for host in ("a,b", "judge:9000", "http://judge:9000", "judge/path", "[::1]:9000", "a b")],
        *[("REWARD_SERVER_PORT", port) for port in ("http", "0", "65535", "8000-8003", "\u0668")],
        *[("REWARD_TOKEN", token) for token in ("se cret", "secret\nx", "sécret")],
    ],
)
def test_what_the_environment_cannot_mean(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=name):
        urls_from_environment(2)
        token_from_environment("REWARD_TOKEN")


@pytest.mark.parametrize("end", ["\n", "\r\n", " "])
def test_white_space_around_a_token_is_not_part_of_it(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_TOKEN", f"secret{end}")
    assert HTTPReward("a:1")._headers() == {"Authorization": "Bearer secret"}
    args = server_parser().parse_args(["--token", f"secret{end}", "--scorers", "jpeg, pseudo,", "--host", "[::1]"])
    check_arguments(args)
    assert (args.token, args.scorers, args.host) == ("secret", ["jpeg", "pseudo"], "::1")


@pytest.mark.parametrize(
    "given", ["", "a:1,,b:1", "a:0", "a:65536", "a:1-99999999999999", "::1:8000:x", "ftp://a:1", "a:b", "a:9-8", "http://a b", []]
)
def test_bad_addresses_are_named(given: str | list[str]) -> None:
    with pytest.raises(ConfigError, match="urls"):
        parse_urls(given)


@pytest.mark.parametrize(
    ("mapping", "servers", "ranks", "answer"),
    [
        ("auto", 4, 4, ["0", "1", "2", "3"]),  # guide: rank i <-> port 8000 + i
        ("rank", 4, 4, ["0", "1", "2", "3"]),
        ("auto", 1, 3, ["0", "0", "0"]),
        ("auto", 2, 4, ["0", "1", "0", "1"]),
        ("auto", 2, 3, ["0", "1", "0"]),
        ("auto", 4, 1, ["0123"]),
        ("auto", 5, 2, ["024", "13"]),
        ("round_robin", 3, 2, ["012", "120"]),
    ],
)
def test_servers_of_rank(mapping: str, servers: int, ranks: int, answer: list[str]) -> None:
    urls = [str(i) for i in range(servers)]
    assert ["".join(servers_of_rank(urls, rank=r, world_size=ranks, mapping=mapping)) for r in range(ranks)] == answer


def test_more_servers_than_ranks_is_an_error_when_each_rank_has_one() -> None:
    with pytest.raises(ConfigError, match=r"4 servers for 2 ranks leaves 2 idle.*mapping: auto"):
        servers_of_rank(["a"] * 4, rank=0, world_size=2, mapping="rank")


def test_setup_says_in_one_sentence_that_nobody_listens() -> None:
    reward = HTTPReward(RedServer().url)  # the port is free: the server was never started
    with pytest.raises(
        ConfigError, match=r"no reward server answers at http://127.0.0.1:\d+ \(.*refused.*\); start one with `python -m"
    ) as raised:
        reward.setup(rank=0, world_size=1, device="cpu")
    assert "\n" not in str(raised.value)


def test_setup_asks_the_server_of_its_rank_only(server: RedServer) -> None:
    with FaultProxy(server.url) as other:
        HTTPReward([server.url, other.url]).setup(rank=0, world_size=2, device="cpu")
        assert other.probes == 0
        HTTPReward([server.url, other.url]).setup(rank=1, world_size=2, device="cpu")
        assert other.probes == 1


def test_setup_accepts_a_server_without_health_and_waits_for_one_that_is_loading(server: RedServer) -> None:
    with RedServer(health=False) as old:
        check_health(old.url, headers={}, patience_s=1.0)
    with FaultProxy(server.url) as loading:
        loading.health = [503, 503]
        check_health(loading.url, headers={}, patience_s=30.0)
        assert loading.probes == 3
        loading.health = [503] * 99
        with pytest.raises(ConfigError, match=r"still loading or draining after 0\.1 s.*deadline_s"):
            check_health(loading.url, headers={}, patience_s=0.1)
        loading.health = [401]
        with pytest.raises(ConfigError, match="status 401"):
            check_health(loading.url, headers={}, patience_s=1.0)


def test_what_is_no_web_server_is_told_so() -> None:
    """An SSH daemon speaks first."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def speak() -> None:
            with listener.accept()[0] as line:
                line.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
                line.recv(1000)

        threading.Thread(target=speak, daemon=True).start()
        with pytest.raises(ConfigError, match="does not speak HTTP"):
            check_health(f"http://127.0.0.1:{listener.getsockname()[1]}", headers={}, patience_s=1.0)


@pytest.mark.parametrize("health", [{}, {"outputs": None}, {"outputs": ["ocr_similarity", "vlm_score"]}])
def test_servers_that_do_not_say_their_scores_pass(health: dict[str, list[str] | None]) -> None:
    check_outputs("http://a", ["vlm_score"], health)
    with pytest.raises(ConfigError, match="not vlm_score"):
        check_outputs("http://a", ["vlm_score"], health | {"outputs": ["ocr_similarity"]})


# -- scores


@pytest.mark.parametrize("route", ["batch", "single"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_order_of_scores_is_order_of_images_when_answers_come_in_any_order(server: RedServer, route: str, seed: int) -> None:
    draw = random.Random(seed)
    reds = [draw.randrange(256) for _ in range(draw.randrange(5, 25))]
    delays = (Fault("slow", seconds=draw.uniform(0, 0.05)) for _ in range(100))
    with FaultProxy(server.url, delays) as proxy:
        reward = HTTPReward(proxy.url, ["red", "blue"], route=route, samples_per_request=draw.randrange(1, 5), concurrency=8)
        scores = reward.score(red_images(reds), prompts(len(reds)))
    assert {name: s.dtype for name, s in scores.items()} == {"red": torch.float64, "blue": torch.float64}
    assert scores["red"].tolist() == pytest.approx(expected(reds), abs=0)
    assert scores["blue"].tolist() == pytest.approx([1 - r for r in expected(reds)], abs=1e-15)


def test_outputs_can_be_renamed_and_targets_travel(server: RedServer) -> None:
    info = [{"prompt": "a", "target": "HELLO"}, {"prompt": "b"}]
    scores = HTTPReward(server.url, {"judge": "red"}).score(red_images([255, 0]), info)
    assert list(scores) == ["judge"] and scores["judge"].tolist() == [1.0, 0.0]
    assert server.targets[-1] == ["HELLO", None]


def test_the_wanted_text_travels_wherever_the_row_names_it(server: RedServer) -> None:
    """`text` and numbers too; what the prompt quotes goes along, so that older servers need not know the quotes."""
    info = [{"prompt": "a", "target": 42}, {"prompt": "b", "text": "meow"}, {"prompt": "„Halt“ bitte"}, {"prompt": "c", "target": ""}]
    HTTPReward(server.url, ["red"]).score(red_images([1, 2, 3, 4]), info)
    assert server.targets[-1] == ["42", "meow", "Halt", None]
    assert HTTPReward(server.url, ["red"], route="single").score(red_images([255]), info[:1])["red"].tolist() == [1.0]


def test_rows_without_a_text_stop_a_run_that_asks_for_ocr() -> None:
    rows = [{"prompt": '"A"'}, {"prompt": "a cat", "where": "train.txt:7"}]
    with pytest.raises(ConfigError, match=r"1 prompt does not say which text.*\n.*train\.txt:7: 'a cat'"):
        HTTPReward("127.0.0.1:1", {"reading": "ocr_similarity"}).check(rows)
    HTTPReward("127.0.0.1:1", ["vlm_score"]).check(rows)


@pytest.mark.parametrize("route", ["batch", "single"])
def test_masks_travel(server: RedServer, route: Literal["batch", "single"]) -> None:
    """255 where the prompt's mask is above 0; with others in a batch, a prompt without one shows everything; alone it sends none."""
    mask = torch.zeros(4, 4, dtype=torch.uint8)
    mask[0, 1] = 1
    info = [{"prompt": "a", "mask": mask}, {"prompt": "b"}, {"prompt": "c", "mask": np.ones((4, 4), bool)}]
    before = len(server.masks)
    scores = HTTPReward(server.url, ["red"], route=route, concurrency=1).score(red_images([0, 255, 0]), info)
    assert scores["red"].tolist() == [0.0, 1.0, 0.0]
    sent = [None if rows is None else [m.tolist() for m in rows] for rows in server.masks[before:]]
    painted, white = (mask * 255).tolist(), [[255] * 4] * 4
    assert sent == ([[painted, white, white]] if route == "batch" else [[painted], None, [white]])
    HTTPReward(server.url, ["red"], route=route).score(red_images([0]), prompts(1))
    assert server.masks[-1] is None


@pytest.mark.parametrize(
    ("mask", "message"),
    [(torch.zeros(4, 4), "mask of prompt 'cafe' is all zero"), (torch.ones(4, 2), r"is \[4, 2\], its image \[4, 4\]")],
)
def test_a_mask_that_does_not_fit_stops_the_run_and_is_not_sent(server: RedServer, mask: torch.Tensor, message: str) -> None:
    before = len(server.masks)
    with pytest.raises(RewardError, match=message):
        HTTPReward(server.url, ["red"]).score(red_images([0]), [{"prompt": "a", "id": "cafe", "mask": mask}])
    assert len(server.masks) == before


def test_requests_carry_size_deadline_and_token(server: RedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_TOKEN", "s3cret")
    HTTPReward(server.url, ["red"], timeout_s=7.0).score(red_images([1, 2, 3]), prompts(3))
    headers = server.headers[-1]
    assert headers["X-Batch-Size"] == "3" and headers["Authorization"] == "Bearer s3cret"
    assert 0 < int(headers["X-Deadline-Ms"]) <= 7000


def test_one_pool_of_connections_serves_every_chunk(server: RedServer) -> None:
    """12 chunks x 4 requests, at most 3 at a time: never more than 3 in flight, and 3 connections do for all 48."""

    async def chunks(reward: HTTPReward) -> None:
        await asyncio.gather(*(reward.score_async(red_images(range(8)), prompts(8)) for _ in range(12)))
        await reward.close()

    with FaultProxy(server.url, (Fault("slow", seconds=0.01) for _ in range(48))) as proxy:
        asyncio.run(chunks(HTTPReward(proxy.url, ["red"], samples_per_request=2, concurrency=3)))
        assert (len(proxy.posts), proxy.most_in_flight) == (48, 3)
        assert len(proxy.connections) <= 4


# -- faults

TRANSIENT = [
    Fault("drop"),
    Fault("cut"),
    Fault("garbage"),
    Fault("short"),
    Fault("hang"),
    *(Fault("status", status) for status in (408, 429, 500, 502, 503, 504)),
]


@pytest.mark.parametrize("fault", TRANSIENT, ids=lambda f: f.kind + str(f.status or ""))
def test_a_passing_fault_costs_one_retry_and_no_score(server: RedServer, fault: Fault) -> None:
    with FaultProxy(server.url, [fault]) as proxy:
        reward = HTTPReward(proxy.url, ["red"], timeout_s=1.5 if fault.kind == "hang" else 60.0)
        assert reward.score(red_images([10, 20]), prompts(2))["red"].tolist() == expected([10, 20])
    assert reward.counters() == {"requests": 2, "retries": 1, "failures": 0, "breaker_opened": 0}


def test_a_server_that_is_always_slower_than_a_try_is_waited_for(server: RedServer) -> None:
    with FaultProxy(server.url, [Fault("slow", seconds=1.0)] * 9) as proxy:
        reward = HTTPReward(proxy.url, ["red"], timeout_s=0.3)
        assert reward.score(red_images([10, 20]), prompts(2))["red"].tolist() == expected([10, 20])
    assert reward.counters()["retries"] >= 2 and reward.counters()["failures"] == 0


@pytest.mark.parametrize(
    ("fault", "requests"),
    [(Fault("status", 400), 1), (Fault("status", 413), 1), (Fault("status", 302), 1), (Fault("status", 500), 2), (Fault("garbage"), 3)],
    ids=lambda v: f"{v.kind}{v.status}" if isinstance(v, Fault) else str(v),
)
def test_a_lasting_fault_is_nan_after_few_tries(server: RedServer, fault: Fault, requests: int) -> None:
    with FaultProxy(server.url, [fault] * 9) as proxy:
        reward = HTTPReward(proxy.url, ["red"])
        assert reward.score(red_images([10, 20]), prompts(2))["red"].isnan().all()
    assert reward.counters() == {"requests": requests, "retries": requests - 1, "failures": 2, "breaker_opened": 0}
    assert proxy.url in reward.last_error and (str(fault.status) in reward.last_error or "not an answer" in reward.last_error)


@pytest.mark.parametrize(("route", "told"), [("batch", True), ("single", False)])
def test_a_server_without_the_route_of_batches_is_told_how_to_be_asked(
    server: RedServer, route: Literal["batch", "single"], told: bool
) -> None:
    with FaultProxy(server.url, [Fault("status", 404)] * 2) as proxy:
        reward = HTTPReward(proxy.url, outputs=["red"], route=route)
        assert reward.score(red_images([1]), prompts(1))["red"].isnan().all()
    assert "status 404" in reward.last_error and ("route: single" in reward.last_error) is told


def test_one_lost_request_leaves_the_others_scored(server: RedServer) -> None:
    with FaultProxy(server.url, [Fault("ok"), Fault("status", 400), Fault("ok")]) as proxy:
        reward = HTTPReward(proxy.url, ["red"], samples_per_request=2, concurrency=1)
        scores = reward.score(red_images([1, 2, 3, 4, 5, 6]), prompts(6))["red"]
    assert scores.isnan().tolist() == [False, False, True, True, False, False]
    assert scores[[0, 1, 4, 5]].tolist() == expected([1, 2, 5, 6])


def test_an_image_that_the_server_cannot_score_is_nan_alone(server: RedServer) -> None:
    reward = HTTPReward(server.url, ["red", "blue"])
    scores = reward.score(red_images([255] * 4), prompts(4, at1="unscorable", at2="null"))
    assert scores["red"].isnan().tolist() == [False, True, True, False]
    assert scores["blue"].tolist() == pytest.approx([0, math.nan, 0, 0], nan_ok=True)
    assert reward.counters()["failures"] == 2 and "image 1: model_error: cannot read it" in reward.last_error


def test_an_error_answered_with_status_200_is_not_a_score(server: RedServer) -> None:
    """Old servers answer `["error", 500]` with status 200; the old client made that 0 and trained on it."""
    with FaultProxy(server.url, [Fault("garbage")] * 3) as proxy:
        assert HTTPReward(proxy.url, ["red"], route="single").score(red_images([9]), prompts(1))["red"].isnan().all()


def test_a_score_the_server_does_not_have_is_named(server: RedServer) -> None:
    with pytest.raises(RewardError, match=r"answers \['blue', 'red'\], not \['vlm_score'\]; set `outputs`"):
        HTTPReward(server.url, ["vlm_score"]).score(red_images([1]), prompts(1))


def test_retry_after_is_waited_for(server: RedServer) -> None:
    with FaultProxy(server.url, [Fault("status", 429, retry_after="0.6")]) as proxy:
        HTTPReward(proxy.url, ["red"]).score(red_images([1]), prompts(1))
    assert proxy.posts[1] - proxy.posts[0] >= 0.6


def test_a_wait_beyond_the_deadline_is_not_begun(server: RedServer) -> None:
    with FaultProxy(server.url, [Fault("status", 429, retry_after="3600")]) as proxy:
        reward = HTTPReward(proxy.url, ["red"], deadline_s=20.0)
        assert reward.score(red_images([1]), prompts(1))["red"].isnan().all()
    assert reward.counters()["requests"] == 1


# -- servers that die


def test_a_dead_server_opens_the_breaker_and_its_return_closes_it(server: RedServer) -> None:
    """40 images, one per request: after 3 refused tries the rest wait for /health instead of knocking, and give up together."""
    proxy = FaultProxy(server.url)
    reward = HTTPReward(proxy.url, ["red"], samples_per_request=1, concurrency=2, deadline_s=2.5, breaker_after=3, probe_s=0.2)

    async def run() -> tuple[torch.Tensor, torch.Tensor]:
        dead = (await reward.score_async(red_images(range(40)), prompts(40)))["red"]
        down = dict(reward.counters())
        with proxy:
            back = (await reward.score_async(red_images(range(40)), prompts(40)))["red"]
        await reward.close()
        assert down["failures"] == 40 and down["breaker_opened"] == 1 and down["requests"] <= 6
        return dead, back

    dead, back = asyncio.run(run())
    assert dead.isnan().all() and back.tolist() == expected(list(range(40)))
    assert "is down for" in reward.last_error and proxy.url in reward.last_error


def test_a_server_restarted_in_time_costs_no_score(server: RedServer) -> None:
    proxy = FaultProxy(server.url, (Fault("slow", seconds=0.02) for _ in range(99))).start()
    reward = HTTPReward(proxy.url, ["red"], samples_per_request=1, concurrency=2, breaker_after=3, probe_s=0.1)

    async def run() -> torch.Tensor:
        scores = asyncio.ensure_future(reward.score_async(red_images(range(30)), prompts(30)))
        while len(proxy.posts) < 5:
            await asyncio.sleep(0.005)
        await asyncio.to_thread(proxy.stop)
        while reward.counters()["breaker_opened"] == 0:
            await asyncio.sleep(0.005)
        await asyncio.to_thread(proxy.start)
        try:
            return (await scores)["red"]
        finally:
            await reward.close()

    scores = asyncio.run(run())
    proxy.stop()
    assert scores.tolist() == expected(list(range(30)))
    assert reward.counters()["retries"] >= 2 and reward.counters()["failures"] == 0


@pytest.mark.parametrize("kwargs", [{"mapping": "rank", "spill": True}, {"mapping": "round_robin"}])
def test_another_server_takes_over(server: RedServer, kwargs: dict) -> None:
    dead = RedServer().url
    reward = HTTPReward([dead, server.url], ["red"], samples_per_request=1, concurrency=1, breaker_after=2, probe_s=60.0, **kwargs)
    reward.own = servers_of_rank(reward.urls, rank=0, world_size=2, mapping=reward.mapping)
    assert reward.score(red_images(range(10)), prompts(10))["red"].tolist() == expected(list(range(10)))
    assert reward.counters()["retries"] == 2


def test_half_open_lets_one_request_through() -> None:
    async def run() -> list[str]:
        breaker, story = Breaker(limit=2, probe_s=0.05), []

        async def alive() -> bool:
            story.append("probe")
            return True

        async def request() -> None:
            await breaker.admit(alive, patience_s=60.0, until=time.monotonic() + 60)
            story.append("sent")
            if story.count("sent") == 1:
                await asyncio.sleep(0.1)  # the others must wait for the verdict on this one
                story.append("answered")
                breaker.succeeded()

        breaker.failed()
        assert breaker.closed
        breaker.failed()
        assert not breaker.closed
        await asyncio.gather(*(request() for _ in range(3)))
        return story

    assert asyncio.run(run()) == ["probe", "sent", "answered", "sent", "sent"]


def test_an_open_breaker_gives_up_when_patience_ends() -> None:
    async def run() -> int:
        breaker, probes = Breaker(limit=1, probe_s=0.02), []

        async def dead() -> bool:
            probes.append(1)
            return False

        breaker.failed()
        with pytest.raises(ServerDown, match="down for"):
            await breaker.admit(dead, patience_s=0.2, until=math.inf)
        before = len(probes)
        await asyncio.sleep(0.03)
        with pytest.raises(ServerDown):  # patience is over, but a due probe is made: it may be back
            await breaker.admit(dead, patience_s=0.2, until=math.inf)
        assert len(probes) == before + 1
        return before

    assert asyncio.run(run()) >= 2


# -- life


def test_pickled_rewards_work_and_keep_no_connection(server: RedServer) -> None:
    async def run(reward: HTTPReward) -> HTTPReward:
        await reward.score_async(red_images([1]), prompts(1))
        copy = pickle.loads(pickle.dumps(reward))
        await reward.close()
        return copy

    copy = asyncio.run(run(HTTPReward(server.url, ["red"])))
    assert copy.score(red_images([51]), prompts(1))["red"].tolist() == [0.2]


@pytest.mark.parametrize("bad", [{"timeout_s": 0}, {"concurrency": -1}, {"outputs": []}, {"route": "pickle"}, {"mapping": "sticky"}])
def test_wrong_knobs_are_named(bad: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        HTTPReward(**bad)


def test_yaml_reaches_every_knob() -> None:
    from jsonargparse import ArgumentParser

    from lit_rl.rewards.base import Reward

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--reward", type=Reward)
    args = {"urls": "127.0.0.1:8000-8003", "outputs": {"ocr": "ocr_similarity"}, "route": "single", "spill": True}
    config = parser.parse_args([f"--reward={json.dumps({'class_path': 'lit_rl.rewards.client.HTTPReward', 'init_args': args})}"])
    reward = parser.instantiate_classes(config).reward
    assert len(reward.urls) == 4 and reward.fields == {"ocr": "ocr_similarity"} and reward.route == "single"
    args["outputs"] = ["vlm_score"]
    config = parser.parse_args([f"--reward={json.dumps({'class_path': 'lit_rl.rewards.client.HTTPReward', 'init_args': args})}"])
    assert parser.instantiate_classes(config).reward.outputs == ["vlm_score"]
