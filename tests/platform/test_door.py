"""Attacks on the service and what becomes of them: the table of its rules, row by row."""

from __future__ import annotations

import ast
import os
import re
import socket
import sys
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from fastapi.testclient import TestClient
from PIL import Image
from served_platform import GUIDE_JOB, asked, listening
from starlette.websockets import WebSocketDisconnect

from lit_rl.net.guards import socket_owner
from lit_rl.platform import samples
from lit_rl.platform.compare import as_csv
from lit_rl.platform.environment import environment_of
from lit_rl.platform.settings import Settings

JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 421),
        ({"host": "localhost.evil.example"}, 421),
        ({"host": "127.0.0.1.nip.io:8000"}, 421),
        ({"host": "[::1]:8000"}, 200),
        ({"host": "127.0.0.1:5173"}, 200),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://localhost:5173"}, 403),
        ({"origin": "http://localhost:8000"}, 200),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"sec-fetch-site": "none"}, 200),
        ({"authorization": "Bearer wrong"}, 401),
        ({"authorization": "Bearer "}, 401),
    ],
)
def test_every_method_is_guarded(platform: TestClient, headers: dict[str, str], status: int) -> None:
    assert platform.get("/api/jobs", headers=headers).status_code == status
    if status != 200:
        uuid = platform.post("/api/jobs", json=GUIDE_JOB).json()["uuid"]
        for method in ("DELETE", "PATCH", "PUT"):
            assert platform.request(method, f"/api/jobs/{uuid}", headers=headers | JSON, content=b"{}").status_code == status
        assert platform.post(f"/api/jobs/{uuid}/start", headers=headers).status_code == status
        assert platform.get(f"/api/jobs/{uuid}").json()["state"] == "created"
        with pytest.raises(WebSocketDisconnect) as refused, platform.websocket_connect("ws://localhost:8000/ws", headers=headers):
            pass
        assert refused.value.code == 1008


def test_two_hosts_are_none(platform: TestClient) -> None:
    assert platform.get("/api/jobs", headers=[("host", "localhost"), ("host", "evil.example")]).status_code == 421


def test_another_user_needs_the_token(tmp_path: Path) -> None:
    with asked(tmp_path, user=65534) as client:
        token = (tmp_path / "data/token").read_text()
        assert (tmp_path / "data/token").stat().st_mode & 0o777 == 0o600
        assert client.get("/api/jobs").status_code == client.get("/metrics").status_code == 401
        assert client.get("/healthz").status_code == client.get("/").status_code == 200
        with pytest.raises(WebSocketDisconnect), client.websocket_connect("ws://localhost:8000/ws"):
            pass
        assert client.get("/api/jobs", headers={"authorization": f"Bearer {token}"}).status_code == 200
        assert client.post("/api/login", json={"token": "x"}).status_code == 401
        entered = client.post("/api/login", json={"token": token})
        cookie = entered.headers["set-cookie"].lower()
        assert entered.status_code == 204 and "httponly" in cookie and "samesite=strict" in cookie
        assert client.get("/api/jobs").status_code == 200  # by the cookie


def test_the_owner_of_a_connection_is_asked_once(tmp_path: Path) -> None:
    asked_for = list[object]()
    with listening(tmp_path, owner=lambda client, _: asked_for.append(client) or os.getuid()) as url:
        for _ in range(2):
            with requests.Session() as session:
                assert [session.get(f"{url}/api/jobs", timeout=60).status_code for _ in range(3)] == [200] * 3
    assert len(asked_for) == len(set(asked_for)) == 2


def test_the_owner_of_a_connection_is_read_from_the_systems_table(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        assert socket_owner(client.getsockname(), server.getsockname()) == os.getuid()
        assert socket_owner(("127.0.0.1", 1), server.getsockname()) is None
    line = "0: 0100007F:C350 0100007F:1F40 {state} 0:0 0:0 0 65534 0 1"
    (tmp_path / "tcp").write_text("header\n" + line.format(state="01"))
    assert socket_owner(("127.0.0.1", 50000), ("127.0.0.1", 8000), tables=tmp_path) == 65534
    (tmp_path / "tcp").write_text("header\n" + line.format(state="06").replace("65534", "0"))
    assert socket_owner(("127.0.0.1", 50000), ("127.0.0.1", 8000), tables=tmp_path) is None  # of a closed one nobody is the owner
    assert socket_owner(("::1", 1), ("::1", 2), tables=tmp_path) is None


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b'{"name": "x"}', "text/plain", 415),
        (b"name=x", "application/x-www-form-urlencoded", 415),
        (b"\x80\x04K\x01.", "application/octet-stream", 415),  # a pickle
        (b"\x80\x04K\x01.", "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b'{"a": 1, "a": 2}', "application/json", 400),
        (b'{"name": NaN}', "application/json", 400),
        (b'{"name": "\xff"}', "application/json", 400),
        (b'{"name": "\\ud800", "algorithm": "grpo"}', "application/json", 400),
        (b'{"num_gpus": 99999999999999999999}', "application/json", 422),
        (b"[]", "application/json", 422),
        (b" " * ((16 << 20) + 1), "application/json", 413),
    ],
)
def test_bodies_that_are_none(platform: TestClient, body: bytes, kind: str, status: int) -> None:
    answer = platform.post("/api/jobs", content=body, headers={"content-type": kind})
    assert answer.status_code == status and answer.json()["error"]["code"]


def test_a_body_that_never_ends_or_never_comes(tmp_path: Path) -> None:
    with listening(tmp_path, body_seconds=0.5) as url:
        port = int(url.rpartition(":")[2])
        head = b"POST /api/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
        for connection in slow:
            connection.sendall(head + b"Content-Length: 1000\r\n\r\n{")
        assert requests.get(f"{url}/healthz", timeout=60).status_code == 200  # meanwhile
        for connection in slow:
            connection.settimeout(60)
            assert connection.recv(100).startswith(b"HTTP/1.1 408")
            connection.close()
        with socket.create_connection(("127.0.0.1", port)) as endless:
            endless.sendall(head + b"Content-Length: 99999999999\r\n\r\n")
            assert endless.recv(100).startswith(b"HTTP/1.1 413")

        def pieces() -> Any:
            for _ in range(80):
                yield b" " * (1 << 20)

        try:
            assert requests.post(f"{url}/api/jobs", data=pieces(), headers=JSON, timeout=60).status_code in (408, 413)
        except requests.ConnectionError:  # refused while it was still sending
            assert requests.get(f"{url}/healthz", timeout=60).status_code == 200


HOSTILE = [
    "x; touch y",
    "$(touch x)",
    "--config=/etc/passwd",
    "!!python/object/apply:os.system ['x']",
    "a: b",
    "'\"",
    "{x: y}",
    "<img src=x>",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_what_a_user_writes_is_a_text_of_the_yaml_and_no_word_of_the_command(platform: TestClient, text: str) -> None:
    import yaml

    job = platform.post("/api/jobs", json=GUIDE_JOB | {"name": text, "model_path": text, "train_data_path": text}).json()
    told = platform.get(f"/api/jobs/{job['uuid']}/config").json()
    assert not any(text in word for word in told["argv"])
    assert yaml.safe_load(told["yaml"])["model"]["init_args"]["policy"]["init_args"]["pretrained"] == text
    assert job["name"] == text  # as it is: the page shows texts as texts


@pytest.mark.parametrize(
    "template", ["../../etc/passwd", "/etc/passwd", "configs/../pyproject.toml", "configs/base", "configs/grpo/x.yaml", "CON"]
)
def test_templates_lie_below_configs(platform: TestClient, template: str) -> None:
    (problem,) = platform.post("/api/jobs", json=GUIDE_JOB | {"template": template}).json()["problems"]
    assert problem["field"] == "template"


@pytest.mark.parametrize(
    "overrides",
    [
        {"trainer.callbacks": [{"class_path": "os.system", "init_args": {"command": "x"}}]},
        {"data.class_path": "subprocess.Popen"},
        {"run.dir": "/etc"},
        {"ckpt_path": "/x"},
        {"config": "/etc/passwd"},
        {"model.init_args.policy": {"class_path": ["x"]}},
        {"trainer.--x": 1},
    ],
)
def test_overrides_set_keys_of_the_run_and_classes_of_this_project(platform: TestClient, overrides: dict[str, object]) -> None:
    job = platform.post("/api/jobs", json=GUIDE_JOB | {"overrides": overrides}).json()
    assert "overrides" in [problem["field"] for problem in job["problems"]]
    assert platform.post(f"/api/jobs/{job['uuid']}/start").status_code == 422


def test_nothing_of_the_environment_comes_from_the_one_who_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "evil.so")
    monkeypatch.setenv("AWS_SECRET", "s")
    ours = dict.fromkeys(("DISABLE_RL_REWARD_MODEL", "REWARD_SERVER_URLS", "GBOX_API_KEY", "VLLM_API_KEY", "OCR_URL", "JUDGE_TOKEN"), "1")
    for name, value in ours.items():
        monkeypatch.setenv(name, value)  # what a run by the command line would read
    found = environment_of(Settings(data=tmp_path), "j", tmp_path, gpus=(1, 3))
    assert found["CUDA_VISIBLE_DEVICES"] == "1,3" and found["JOB_UUID"] == "j" and "PATH" in found and ours.items() <= found.items()
    assert not {"LD_PRELOAD", "AWS_SECRET", "PYTHONSTARTUP"} & found.keys()


def picture(side: int = 8, mode: str = "RGB", **more: Any) -> bytes:
    file = BytesIO()
    Image.fromarray(np.zeros((side, side, 3), np.uint8)).convert(mode).save(file, "PNG", **more)
    return file.getvalue()


def sent(client: TestClient, data: bytes, name: str = "a.png") -> Any:
    item = '{"items": [{"step": 1, "prompt": "<b>p</b>", "rewards": {"ocr": 0.5, "clip": null}, "images": ["a"]}]}'
    return client.post("/api/jobs/j/samples", data={"samples": item}, files={"a": (name, data, "image/png")})


def test_pictures_are_drawn_anew(platform: TestClient) -> None:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("comment", "<script>")
    assert sent(platform, picture(pnginfo=info), "../../x.png").status_code == 201
    (item,) = platform.get("/api/jobs/j/samples").json()["items"]
    assert item["prompt"] == "<b>p</b>" and item["reward"] == 0.5
    shown = platform.get(item["image_url"])
    assert shown.headers["content-type"] == "image/webp" and b"<script>" not in shown.content
    assert Image.open(BytesIO(shown.content)).size == (8, 8)
    assert platform.get("/api/jobs/j/samples/1/images/..%2f0.webp").status_code in (404, 422)


def bombs() -> dict[str, bytes]:
    wide = bytearray(picture())
    wide[16:24] = (30_000).to_bytes(4, "big") * 2
    frames, svg = BytesIO(), b'<svg xmlns="http://www.w3.org/2000/svg"/>'
    Image.new("RGB", (4, 4)).save(frames, "GIF", save_all=True, append_images=[Image.new("RGB", (4, 4), "red")])
    return {
        "30000 x 30000": bytes(wide),
        "cut": picture()[:40],
        "gif": frames.getvalue(),
        "svg": svg,
        "empty": b"",
        "2 MB": b"x" * (2 << 20),
    }


def test_samples_of_a_step_are_bounded(platform: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first ones stay, with their pictures; another step has room of its own."""
    monkeypatch.setattr(samples, "KEPT_OF_STEP", 2)
    assert [sent(platform, picture()).json()["accepted"] for _ in range(3)] == [1, 1, 0]
    items = platform.get("/api/jobs/j/samples").json()["items"]
    assert len(items) == 2 and all(platform.get(item["image_url"]).status_code == 200 for item in items)
    both = '{"items": [{"step": 1, "prompt": "p"}, {"step": 2, "prompt": "p"}]}'
    assert platform.post("/api/jobs/j/samples", files={"samples": (None, both)}).json() == {"accepted": 1}


@pytest.mark.parametrize("name", ["30000 x 30000", "cut", "gif", "svg", "empty", "2 MB"])
def test_bombs_are_refused_before_they_are_drawn(platform: TestClient, name: str) -> None:
    answer = sent(platform, bombs()[name])
    assert answer.status_code in (400, 413, 422) and answer.json()["error"]["message"]
    assert platform.get("/api/jobs/j/samples").json().get("items", []) == []


def test_formulas_are_texts_in_tables(platform: TestClient) -> None:
    assert as_csv([{"=cmd()": 1.0, "b": "-1+1"}]).splitlines() == ["'=cmd(),b", "1.0,'-1+1"]
    platform.post("/api/jobs/j/metrics", json={"points": [{"step": 1, "metrics": {"=cmd()": 1.0}}]})
    assert "'=cmd()" in platform.get("/api/jobs/j/metrics.csv").text


def test_the_package_reads_no_pickles_and_asks_nobody() -> None:
    """Without a client of HTTP no address that somebody writes down can make the service ask it."""
    import lit_rl.platform

    for path in Path(lit_rl.platform.__path__[0]).rglob("*.py"):
        tree = ast.parse(path.read_text())
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not [name for name in names if re.match(r"requests|aiohttp|httpx|urllib\.request|http\.client|websockets", name)], path
        names = {name.split(".")[0] for name in names}
        words = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert not names & {"pickle", "marshal", "shelve"} and not words & {"torch.load", "yaml.load", "eval", "exec", "os.system"}, path
        assert not any(word.arg == "shell" for node in ast.walk(tree) if isinstance(node, ast.Call) for word in node.keywords), path


def test_a_job_whose_folder_is_gone_is_no_end_of_the_service(platform: TestClient) -> None:
    uuid = platform.post("/api/jobs", json=GUIDE_JOB).json()["uuid"]
    records = platform.app.state.service.records  # type: ignore[attr-defined]
    records.change(uuid, state="running", started_at=time.time())
    end = time.monotonic() + 120
    while platform.get(f"/api/jobs/{uuid}").json()["state"] != "failed":
        assert time.monotonic() < end
        time.sleep(0.1)
    assert sys.modules["lit_rl.platform.app"] and "lost" in platform.get(f"/api/jobs/{uuid}").json()["exit"]["reason"]
