"""Reward servers that are well, ill, mute or somebody else."""

from __future__ import annotations

import math
import socket

import numpy as np
import pytest
import torch
from aiohttp import web
from rewards.fault_proxy import FaultProxy, RedServer
from rewards.test_launch import free_ports

from lit_rl.doctor import servers
from lit_rl.doctor.report import Finding
from lit_rl.doctor.servers import of_environment, of_reward, ports, shared
from lit_rl.net.gpus import Gpu
from lit_rl.rewards.client import HTTPReward
from lit_rl.rewards.ocr import OCRReward


@pytest.fixture(autouse=True)
def no_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in servers.NAMES:
        monkeypatch.delenv(name, raising=False)


def statuses(findings: list[Finding]) -> list[str]:
    return [finding.status for finding in findings]


@pytest.mark.parametrize("route", ["batch", "single"])
def test_each_rank_s_server_scores_a_picture_by_the_run_s_own_client(route: str) -> None:
    """White in the corner: red 1.0."""
    with RedServer() as one, RedServer() as two:
        counts, first, second = of_reward(HTTPReward([one.url, two.url], outputs={"r": "red"}, route=route), "colour", processes=2)  # type: ignore[arg-type]
        assert counts.status == "ok" and f"rank 0 {one.url}, rank 1 {two.url}" in counts.text
        assert (first.status, first.about) == ("ok", f"reward server {one.url}") and first.text.startswith("r 1.000")
        assert second.about == f"reward server {two.url}"
        assert len(one.headers) == len(two.headers) == 1


def test_what_is_wrong_with_a_server_is_said() -> None:
    with RedServer() as red, FaultProxy(red.url) as loading:
        assert statuses(of_reward(HTTPReward(red.url, outputs=["red"]), "colour", processes=2)) == ["warning", "ok"]  # they share
        (_, wrong) = of_reward(HTTPReward(red.url, outputs=["green"]), "colour", processes=1)
        assert wrong.status == "problem" and "['blue', 'red'], not ['green']" in wrong.text
        loading.health = [503] * 99
        (_, slow) = of_reward(HTTPReward(loading.url, outputs=["red"]), "colour", processes=1)
        assert slow.status == "problem" and "still loading" in slow.text
    (_, down) = of_reward(HTTPReward(red.url), "colour", processes=1)
    assert down.status == "problem" and "no reward server answers" in down.text


class TextServer(RedServer):
    """Says that it scores texts."""

    async def _health(self, _: web.Request) -> web.Response:
        return web.json_response({"status": "ready", "outputs": ["score", "acc"], "media": ["texts"]})


def test_a_server_of_texts_is_sent_no_picture() -> None:
    with TextServer() as server:
        (_, found) = of_reward(HTTPReward(server.url, outputs=["score"]), "rules", processes=1)
        (same,) = of_environment([server.url], processes=1, token=None)
        assert found == same == Finding("ok", f"reward server {server.url}", "ready, scores texts: score, acc")
        (_, wrong) = of_reward(HTTPReward(server.url, outputs=["ocr_similarity"]), "rules", processes=1)
        assert wrong.status == "problem" and "gives the scores score, acc, not ocr_similarity" in wrong.text
        assert server.headers == []


def test_without_a_run_the_environment_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that nobody named is only missed."""
    monkeypatch.setattr(servers, "urls_from_environment", lambda count: ["127.0.0.1:9"] * count)
    assert statuses(of_environment([], processes=1, token=None)) == ["warning"]
    assert statuses(of_environment(["127.0.0.1:9"], processes=1, token=None)) == ["problem"]
    with RedServer() as red:
        (finding,) = of_environment([red.url], processes=4, token="secret")
        assert (finding.status, finding.text) == ("ok", "red 1.000, blue 1.000 for a picture of 'HELLO'")
        assert red.headers[0]["Authorization"] == "Bearer secret"


@pytest.mark.parametrize(
    ("scores", "status"),
    [
        ({"ocr_similarity": 1.0, "ocr_confidence": 0.9}, "ok"),
        ({"ocr_similarity": 0.2}, "warning"),
        ({"vlm_score": math.nan, "ocr_similarity": 1.0}, "problem"),
        ({}, "problem"),
    ],
)
def test_scores_are_judged(scores: dict[str, float], status: str) -> None:
    assert servers._judge("http://a", scores).status == status


def test_ports_are_free_taken_or_served() -> None:
    first = free_ports(2)
    assert statuses(list(ports(["4", "5"], first=first))) == ["ok", "ok"]
    with socket.create_server(("0.0.0.0", first)):
        taken, free = ports(["4", "5"], first=first)
        assert taken.status == "problem" and f"{first}: Address already in use by" in taken.text and free.status == "ok"
    with RedServer() as red:
        (served,) = ports(["4"], first=red.port)
        assert served.status == "ok" and "answers there already" in served.text


@pytest.mark.parametrize(
    ("train", "launch", "gpus", "expected"),
    [
        ("0123", "4567", 0, ["ok"]),
        ("0123", "3456", 0, ["problem"]),
        ("0123", "45", 0, ["warning"]),
        ("01", "23", 4, ["ok"]),
        ("01", "45", 4, ["problem", "ok"]),
        ("4", "", 4, ["problem"]),
    ],
)
def test_training_and_servers_keep_off_each_other(train: str, launch: str, gpus: int, expected: list[str]) -> None:
    assert statuses(list(shared(list(train), list(launch), found=[Gpu(i, "", 1, 0, 9.0) for i in range(gpus)]))) == expected


def test_the_picture_tells_a_server_that_reads_single_lines_from_one_that_finds_them() -> None:
    image, rows = torch.from_numpy(np.array(servers.picture())).permute(2, 0, 1)[None], [servers.INFO]
    assert OCRReward().score(image, rows)["ocr_similarity"].item() == 1.0
    lines = OCRReward(detect=False).score(image, rows)
    assert (finding := servers._judge("http://a", {name: value.item() for name, value in lines.items()})).status == "warning"
    assert "`detect: false`" in finding.text
