"""Strange requests, full disks, damaged files, clocks that are set and two at the same time: each has its answer, none stops the others."""

from __future__ import annotations

import errno
import os
import socket
import sqlite3
import struct
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
import sqlalchemy as sa
from fastapi.testclient import TestClient
from served_platform import GUIDE_JOB, asked, listening
from starlette.websockets import WebSocketDisconnect
from test_door import picture, sent
from test_life_cycle import new, state
from test_reports import report, service
from websockets.sync.client import connect

from lit_rl.platform import metrics, places, processes, store, supervisor
from lit_rl.platform.__main__ import main
from lit_rl.platform.answers import text_of
from lit_rl.platform.hub import KEPT_WEIGHT, Hub
from lit_rl.platform.patience import PatientProtocol
from lit_rl.platform.schema import alerts
from lit_rl.platform.settings import token_of

JSON = {"content-type": "application/json"}
PLACES = ["/" + "a" * 4000, "a" * 300, "~nobodyatall/x", "/proc/1/root/x", "\u202e/x"]
"""Names that no file can have, a user who does not exist, a folder into which others may not look, letters that turn the line around."""


@pytest.mark.parametrize("value", ["1" + "0" * 30, "[" * 200 + "]" * 200, "1e999"])
def test_a_value_that_could_not_be_answered_is_refused(platform: TestClient, value: str) -> None:
    """Kept, it would make every later list of jobs and checkpoints an error."""
    job = f'{{"name": "a", "algorithm": "grpo", "overrides": {{"trainer.x": {value}}}}}'
    checkpoint = f'{{"step": 1, "path": "x", "eval_results": {{"a": {value}}}}}'
    for url, body in (("/api/jobs", job), ("/api/jobs/j/checkpoints", checkpoint)):
        assert platform.post(url, content=body, headers=JSON).status_code == 422
    assert platform.get("/api/jobs").json()["items"] == []


@pytest.mark.parametrize("place", PLACES)
def test_any_path_has_an_answer(platform: TestClient, place: str) -> None:
    for field in ("model_path", "train_data_path", "template"):
        made = platform.post("/api/jobs", json=GUIDE_JOB | {field: place})
        assert made.status_code == 201 and made.json()["problems"]
        assert platform.get(f"/api/jobs/{made.json()['uuid']}/config").status_code == 200
    assert platform.post("/api/models/merge", json={"inputs": [{"path": place}], "output_name": "x"}).status_code == 422
    assert platform.get("/api/algorithms/grpo/form", params={"template": place}).status_code == 422
    assert platform.post("/api/jobs/j/checkpoints", json={"step": 1, "path": place}).status_code == 201
    (found,) = platform.get("/api/jobs/j/checkpoints").json()
    assert not found["exists"] and platform.get(f"/api/jobs/j/checkpoints/{found['id']}/download").status_code == 404


def test_a_reported_folder_is_measured_only_so_far(platform: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "MOST_FILES", 3)
    for number in range(5):
        (tmp_path / f"{number}.bin").write_bytes(b"12")
    assert platform.post("/api/jobs/j/checkpoints", json={"step": 1, "path": "/"}).json()["size_bytes"] is None
    assert places.size_of(tmp_path / "0.bin") == 2 and places.size_of(tmp_path) is None and places.size_of(tmp_path / "none") is None


def test_names_of_files_that_json_does_not_have(platform: TestClient, tmp_path: Path) -> None:
    report(platform, "j", {"step": 1, "metrics": {"x": 1.0}})
    folder = tmp_path / "data/runs/j/checkpoints"
    folder.mkdir(parents=True)
    (folder / os.fsdecode(b"\xff.ckpt")).touch()
    (folder / "a-7.ckpt").touch()
    (found,) = platform.get("/api/jobs/j/checkpoints").json()
    assert found["step"] == 7 and (text_of(1e12) or "").startswith("9999")
    assert platform.get("/api/models").status_code == 200


def test_overrides_do_not_say_where_a_run_writes(platform: TestClient) -> None:
    for overrides in ({"run": {"dir": "/etc", "name": "x"}}, {"run": None}, {"run.name.x": 1}):
        job = platform.post("/api/jobs", json=GUIDE_JOB | {"overrides": overrides}).json()
        assert "overrides" in [problem["field"] for problem in job["problems"]]


def test_one_key_makes_one_job_also_at_the_same_time(platform: TestClient) -> None:
    def asks(key: str, **more: str) -> Any:
        return platform.post("/api/jobs", json=GUIDE_JOB | more, headers={"Idempotency-Key": key})

    with ThreadPoolExecutor(8) as pool:
        assert len({answer.json()["uuid"] for answer in pool.map(asks, ["k"] * 8)}) == 1
    assert [asks(key, name=key).status_code for key in ("a:b", "a", "A", "a:", "%")] == [201] * 5
    assert asks("a", name="b").status_code == 409


def test_starts_at_the_same_time_are_one(tmp_path: Path, root: Path) -> None:
    with asked(tmp_path, run_root=root, gpu_ids=(), cpu_jobs=0) as client, ThreadPoolExecutor(8) as pool:
        uuid = new(client)
        codes = list(pool.map(lambda _: client.post(f"/api/jobs/{uuid}/start").status_code, range(8)))
        assert sorted(codes) == [202] + [409] * 7 and state(client, uuid) == "queued"


def test_a_job_may_be_made_and_removed_again_and_again(platform: TestClient, tmp_path: Path) -> None:
    """Its folders do not meet in the trash, and its alerts are its own."""
    for _ in range(3):
        report(platform, "j", {"step": 1, "metrics": {"x": None}})
        assert [found["rule"] for found in platform.get("/api/jobs/j/alerts").json()] == ["nan"]
        (tmp_path / "data/runs/j").mkdir(parents=True)
        assert platform.delete("/api/jobs/j?files=true").status_code == 204
    assert len(list((tmp_path / "data/trash").iterdir())) == 3


def test_an_alert_is_opened_once_by_many(platform: TestClient) -> None:
    here = service(platform)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: here.alerts.note("j", "kl", "high"), range(32)))
    with here.store.read() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(alerts)).scalar() == 1


def test_a_word_with_topics_that_are_none_ends_the_connection(platform: TestClient) -> None:
    with platform.websocket_connect("ws://localhost:8000/ws") as connection:
        connection.receive_json()
        connection.send_text('{"type": "subscribe", "topics": [[]]}')
        with pytest.raises(WebSocketDisconnect) as ended:
            connection.receive_json()
        assert ended.value.code == 1008


def test_texts_of_a_picture_are_no_bombs(platform: TestClient) -> None:
    """50 MB of zeros in a few kilobytes, before the pixels and after them."""
    whole, body = picture(), b"a\0\0" + zlib.compress(b"\0" * (50 << 20))
    chunk = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    for place in (33, len(whole) - 12):
        assert sent(platform, whole[:place] + chunk + whole[place:]).status_code == 422
    item = '{"items": [{"step": 1, "prompt": "p", "rewards": {"a": 1e308, "b": 1e308}, "images": ["a"]}]}'
    assert platform.post("/api/jobs/j/samples", data={"samples": item}, files={"a": ("a", whole, "image/png")}).status_code == 201
    assert platform.get("/api/jobs/j/samples").json()["items"][0]["reward"] == 1e308


def test_a_full_disk_and_a_busy_database_say_when_to_come_again(platform: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite's own limit of pages stands in for the end of the disk. Nothing of what is refused is kept, and reading goes on."""
    here = service(platform)
    with here.store.write() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
    here.store._engine.dispose()
    sa.event.listen(here.store._engine, "connect", lambda raw, _: raw.execute(f"PRAGMA max_page_count = {pages + 1}"))
    points = {"points": [{"step": step, "metrics": {f"{k:0200}": 1.0 for k in range(100)}} for step in range(100)]}
    full = platform.post("/api/jobs/j/metrics", json=points)
    assert full.status_code == 503 and full.json()["error"]["code"] == "storage_full" and int(full.headers["retry-after"]) > 0
    assert platform.get("/healthz").status_code == 200

    def none_left(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", none_left)
    monkeypatch.setattr(here.records, "register", lambda name: {})
    assert sent(platform, picture()).json()["error"]["code"] == "storage_full"
    locked = sa.exc.OperationalError("", {}, sqlite3.OperationalError("database is locked"))
    monkeypatch.setattr(here.records, "listed", lambda **_: (_ for _ in ()).throw(locked))
    assert platform.get("/api/jobs").json()["error"]["code"] == "database_busy"


def test_a_damaged_database_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(store, "BUSY_SECONDS", 0.05)
    words = ["--port", "0", "--page-port", "0", "--data"]
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/platform.db").write_bytes(b"no database at all" * 1000)
    store.Store((tmp_path / "broken/..").resolve()).close()
    held = sqlite3.connect(tmp_path / "platform.db", isolation_level=None)
    held.execute("BEGIN IMMEDIATE")
    (tmp_path / "file").touch()
    for folder, sentence in (("broken", "the file is damaged"), ("", "another program holds the file"), ("file", "File exists")):
        assert main([*words, str(tmp_path / folder)]) == 2
        assert sentence in (said := capsys.readouterr().err) and said.count("\n") == 1
    held.close()


def test_an_empty_token_lets_nobody_in(tmp_path: Path) -> None:
    (tmp_path / "token").touch(0o600)
    with pytest.raises(ValueError, match="shorter than 16 letters"):
        token_of(tmp_path)
    (tmp_path / "token").write_text("x" * 40)
    (tmp_path / "token").chmod(0o644)
    with pytest.raises(ValueError, match="others may read it"):
        token_of(tmp_path)


def test_a_job_that_cannot_be_started_fails_and_the_others_go_on(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk at the start; a shim that dies at once; a file that is no JSON any more. No start is tried for ever."""
    launched: list[Path] = []

    def counted(folder: Path, *_: object, **__: object) -> Any:
        launched.append(folder)
        if len(launched) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        with (folder / "shim.log").open("w") as said:
            return subprocess.Popen([sys.executable, "-c", "raise SystemExit('no room for a process')"], stderr=said)

    monkeypatch.setattr(processes, "launch", counted)
    with asked(tmp_path, run_root=root, gpu_ids=(), cpu_jobs=9) as client:
        full, torn, broken = (new(client) for _ in range(3))
        records, watch = service(client).records, service(client).supervisor
        for uuid in (full, torn, broken):
            records.folder(uuid).mkdir(parents=True)
        (records.folder(broken) / "exit.json").write_text("{")
        records.change(broken, state="running")
        for uuid in (full, torn):
            assert client.post(f"/api/jobs/{uuid}/start").status_code == 202
        end = time.monotonic() + 120
        while {state(client, full), state(client, torn)} != {"failed"}:
            assert time.monotonic() < end
            watch.look()
            time.sleep(0.05)
        reasons = {uuid: client.get(f"/api/jobs/{uuid}").json()["exit"]["reason"] for uuid in (full, torn)}
        assert "No space left on device" in reasons[full] and "no room for a process" in reasons[torn] and len(launched) == 2
        records.change(broken, state="failed")


def test_a_clock_that_is_set_ends_no_job_early_or_late(platform: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    watch, now = service(platform).supervisor, {"time": 1e9, "monotonic": 50.0}
    monkeypatch.setattr(supervisor, "time", SimpleNamespace(time=lambda: now["time"], monotonic=lambda: now["monotonic"]))
    job = {"uuid": "j", "stop_requested_at": 1e9, "kill_at": 1e9 + 300.0}
    assert not watch._late(job)
    for clock, passed, late in ((1e9 + 86400, 1.0, False), (1e9 - 86400, 299.0, False), (1e9 - 86400, 300.0, True)):
        now.update(time=clock, monotonic=50.0 + passed)
        assert watch._late(job) == late
    now["time"] = 1e9 - 86400  # another server, after the clock was set back: the whole grace at most
    other = job | {"uuid": "k"}
    assert not watch._late(other)
    now["monotonic"] += 300.0
    assert watch._late(other)


def test_events_are_kept_by_their_weight() -> None:
    """Batches of a thousand steps and logs of 256 KiB would else fill the memory long before their number is reached."""
    hub = Hub()
    points = [{"step": step, "metrics": dict.fromkeys(map(str, range(96)), 1.0)} for step in range(1000)]
    for _ in range(50):
        hub.publish("metrics", "j", points=points)
        hub.publish("log", "j", text="x" * 262_144)
    assert hub._weight <= KEPT_WEIGHT and 5 < len(hub._kept) < 20 and hub.seq == 100


def test_an_answer_has_a_bounded_number_of_numbers(platform: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    report(platform, "j", *({"step": step, "metrics": {"a": 1.0, "b": 2.0}} for step in range(10)))
    monkeypatch.setattr(metrics, "MAX_CELLS", 8)
    for query, expected in (("", [6, 7, 8, 9]), ("?since_step=0", [1, 2, 3, 4]), ("?keys=a", list(range(2, 10)))):
        answer = platform.get(f"/api/jobs/j/metrics{query}")
        assert [row["step"] for row in answer.json()] == expected and answer.headers["x-truncated"] == "true"
    assert "x-truncated" not in platform.get("/api/jobs/j/metrics?since_step=7").headers
    assert len(platform.get("/api/jobs/j/series?points=1000").json()["a"]["step"]) == 1


def test_a_report_that_comes_while_silence_is_judged_is_heard(platform: TestClient) -> None:
    report(platform, "j", {"step": 1, "metrics": {"x": 1.0}})
    records = service(platform).records
    assert not records.silent("j", time.time() - 600) and records.silent("j", time.time() + 1) and not records.silent("j", time.time() + 1)


def test_a_head_that_does_not_end_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing at all, half a head, and half a second head are closed; a WebSocket stays."""
    monkeypatch.setattr(PatientProtocol, "head_seconds", 1.0)
    with listening(tmp_path) as url:
        port = int(url.rpartition(":")[2])
        with connect(f"{url.replace('http', 'ws')}/ws", open_timeout=60) as open_socket:
            sockets = [socket.create_connection(("127.0.0.1", port), timeout=60) for _ in range(20)]
            for number, connection in enumerate(sockets):
                head = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
                connection.sendall((b"", head, head + b"\r\n" + head)[number % 3])
            for connection in sockets:
                while connection.recv(1000):
                    pass
                connection.close()
            assert requests.get(f"{url}/healthz", timeout=60).status_code == 200
            report_url = f"{url}/api/jobs/j/status"
            assert requests.post(report_url, json={"status": "running"}, timeout=60).status_code == 200
            assert '"hello"' in str(open_socket.recv(60)) and '"state"' in str(open_socket.recv(60))
