"""Jobs are made, listed, changed and forgotten over REST, and errors have one form."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import requests
import sqlalchemy as sa
from fastapi.testclient import TestClient
from served_platform import GUIDE_JOB, asked, listening

from lit_rl.platform.__main__ import main
from lit_rl.platform.app import create_app
from lit_rl.platform.schema import VERSION, metadata
from lit_rl.platform.settings import Settings
from lit_rl.platform.store import Store, filesystem_of


def test_a_job_keeps_what_it_was_asked_with_over_a_restart(tmp_path: Path) -> None:
    with asked(tmp_path) as client:
        answer = client.post("/api/jobs", json=GUIDE_JOB)
        assert answer.status_code == 201
        job = answer.json()
    assert {key: job[key] for key in GUIDE_JOB} == GUIDE_JOB
    assert job["state"] == "created" and job["source"] == "platform" and job["progress"]["step"] is None
    with asked(tmp_path) as client:
        assert client.get(f"/api/jobs/{job['uuid']}").json() == job


def test_jobs_are_listed_by_pages_from_the_newest(platform: TestClient) -> None:
    for number in range(5):
        platform.post("/api/jobs", json=GUIDE_JOB | {"name": f"job {number}"})
    first = platform.get("/api/jobs", params={"limit": 3}).json()
    second = platform.get("/api/jobs", params={"limit": 3, "cursor": first["next_cursor"]}).json()
    assert [job["name"] for job in first["items"] + second["items"]] == [f"job {n}" for n in (4, 3, 2, 1, 0)]
    assert second["next_cursor"] is None
    assert [job["name"] for job in platform.get("/api/jobs", params={"q": "b 3"}).json()["items"]] == ["job 3"]
    assert platform.get("/api/jobs", params={"q": "100%_"}).json()["items"] == []


def test_names_and_tags_change_and_nothing_else(platform: TestClient) -> None:
    url = f"/api/jobs/{platform.post('/api/jobs', json=GUIDE_JOB).json()['uuid']}"
    assert platform.patch(url, json={"tags": ["a"], "notes": "n"}).json()["tags"] == ["a"]
    refused = platform.patch(url, json={"num_gpus": 1})
    assert refused.status_code == 422 and refused.json()["error"]["details"][0]["field"] == "num_gpus"
    assert platform.delete(url).status_code == 204
    assert platform.get(url).json()["error"]["code"] == "job_not_found"


def test_one_idempotency_key_makes_one_job(platform: TestClient) -> None:
    key = {"Idempotency-Key": "k1"}
    one, two = (platform.post("/api/jobs", json=GUIDE_JOB, headers=key).json()["uuid"] for _ in range(2))
    other = platform.post("/api/jobs", json=GUIDE_JOB | {"name": "x"}, headers=key)
    assert one == two and other.status_code == 409 and len(platform.get("/api/jobs").json()["items"]) == 1


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"num_gpu": 8}, "num_gpu"),
        ({"num_gpus": "8"}, "num_gpus"),
        ({"num_gpus": True}, "num_gpus"),
        ({"learning_rate": 0}, "learning_rate"),
        ({"batch_size": 2**70}, "batch_size"),
        ({"name": "a\nb"}, "name"),
        ({"name": "  "}, "name"),
        ({"model_path": "a\0b"}, "model_path"),
        ({"name": "x" * 4096}, "name"),
    ],
)
def test_a_wrong_field_is_named(platform: TestClient, body: dict[str, object], field: str) -> None:
    error = platform.post("/api/jobs", json=GUIDE_JOB | body)
    assert error.status_code == 422
    assert error.json()["error"]["details"][0]["field"] == field and field in error.json()["error"]["message"]
    assert error.headers["x-request-id"] == error.json()["error"]["request_id"]


@pytest.mark.parametrize("path", ["/api/nothing", "/nothing", "/api/jobs/..%2f..%2fetc", "/api/jobs/a%00b", "/assets/../__main__.py"])
def test_what_is_not_there_has_the_same_form(platform: TestClient, path: str) -> None:
    answer = platform.get(path)
    assert answer.status_code in (404, 422) and set(answer.json()["error"]) == {"code", "message", "details", "request_id"}


def test_the_api_describes_itself_and_the_server_its_health(platform: TestClient) -> None:
    described = platform.get("/api/openapi.json").json()
    assert described["openapi"].startswith("3.") and "/api/jobs/{name}" in described["paths"]
    assert platform.get("/healthz").json()["db"] == "ok"
    assert "script-src 'self'" in platform.get("/").headers["content-security-policy"]
    assert platform.put("/api/jobs", json={}).json()["error"]["code"] == "method_not_allowed"


def test_the_page_is_served_from_its_folder(tmp_path: Path) -> None:
    page = tmp_path / "page"
    (page / "assets").mkdir(parents=True)
    (page / "index.html").write_text("<title>x</title>")
    (page / "assets/a.js").write_text("1")
    app = create_app(Settings(data=tmp_path / "data", owner=lambda *_: None), page=page)
    with TestClient(app, base_url="http://localhost:8000") as client:
        assert client.get("/").text == "<title>x</title>" and client.get("/assets/a.js").text == "1"


def columns(store: Store) -> dict[str, list[tuple[str, str, bool]]]:
    """Name, type and whether it may be NULL of each column of each table."""
    with store.read() as connection:
        inspector = sa.inspect(connection)
        return {
            table: [(column["name"], str(column["type"]), column["nullable"]) for column in inspector.get_columns(table)]
            for table in inspector.get_table_names()
        }


def test_a_database_of_the_first_version_becomes_one_of_today(tmp_path: Path) -> None:
    """The first version has neither tasks nor selected checkpoints; what it holds is kept."""
    store = Store(tmp_path)
    new = columns(store)
    assert new.keys() - {"sqlite_sequence"} == metadata.tables.keys()
    row = "INSERT INTO checkpoints (job, step, path, kind, created_at) VALUES ('j', 3, 'a.ckpt', 'reported', 1.0)"
    with store.write() as connection:
        for statement in (row, "ALTER TABLE checkpoints DROP COLUMN chosen", "DROP TABLE tasks", "PRAGMA user_version = 1"):
            connection.exec_driver_sql(statement)
    store.close()
    store = Store(tmp_path)
    assert columns(store) == new
    with store.read() as connection:
        assert connection.exec_driver_sql("SELECT job, step, path, chosen FROM checkpoints").all() == [("j", 3, "a.ckpt", None)]
    store.close()
    Store(tmp_path).close()  # and again, where nothing is to be done


def test_a_method_that_nobody_knows_has_no_command(platform: TestClient) -> None:
    job = platform.post("/api/jobs", json=GUIDE_JOB | {"algorithm": "rlhf9000"})
    assert job.status_code == 201 and job.json()["problems"][0]["field"] == "algorithm"
    assert platform.get(f"/api/jobs/{job.json()['uuid']}/config").json()["argv"] == []
    assert platform.post(f"/api/jobs/{job.json()['uuid']}/start", json={}).status_code == 422


def test_a_database_of_a_later_release_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.write() as connection:
        connection.exec_driver_sql(f"PRAGMA user_version = {VERSION + 1}")
    store.close()
    with pytest.raises(ValueError, match="use the release that wrote it"):
        Store(tmp_path)


def test_a_network_file_system_is_told_by_its_mount(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"x / ext4 rw 0 0\nserver:/x {tmp_path} nfs4 rw 0 0\n")
    assert filesystem_of(tmp_path / "deep", mounts) == "nfs4" and filesystem_of(Path("/usr"), mounts) == "ext4"


def test_one_server_works_in_a_folder_and_a_taken_port_names_its_owner(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with listening(tmp_path) as url:
        assert main(["--data", str(tmp_path / "data"), "--port", "0", "--page-port", "0"]) == 2
        assert "another server works in" in capsys.readouterr().err
        port = url.rpartition(":")[2]
        assert main(["--data", str(tmp_path / "other"), "--port", "0", "--page-port", port]) == 2
        assert f"127.0.0.1:{port}" in (said := capsys.readouterr().err) and "--page-port" in said and "pid" in said


def test_the_same_user_of_this_machine_needs_no_token(tmp_path: Path) -> None:
    """As the guide's snippet asks, over a real connection."""
    with listening(tmp_path) as url:
        job = requests.post(f"{url.replace('127.0.0.1', 'localhost')}/api/jobs", json=GUIDE_JOB, timeout=30).json()
        assert requests.get(f"{url}/api/jobs/{job['uuid']}", timeout=30).json()["name"] == GUIDE_JOB["name"]
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as raw:
            raw.sendall(b"GET /api/jobs HTTP/1.1\r\nHost: evil.example\r\n\r\n")
            assert raw.recv(100).startswith(b"HTTP/1.1 421")


@pytest.mark.parametrize(
    ("size", "gpus", "strategy", "adapter"),
    [
        ("0.5B", 1, "auto", False),
        ("0.5B", 4, "DDPStrategy", False),
        ("7B", 1, "auto", True),
        ("7B", 8, "FSDP2Strategy", False),
        ("14B", 2, "DDPStrategy", True),
        ("72B", 8, "FSDP2Strategy", True),
    ],
)
def test_size_and_gpus_choose_strategy_and_adapter(tmp_path: Path, size: str, gpus: int, strategy: str, adapter: bool) -> None:
    """18 bytes for a trained weight, sharded; 3 for a frozen one below an adapter: 14B fit on each GPU, 72B do not."""
    with asked(tmp_path, gpu_ids=tuple(range(8))) as client:
        job = client.post("/api/jobs", json={"name": "n", "algorithm": "grpo", "model_size": size, "num_gpus": gpus}).json()
        config = client.get(f"/api/jobs/{job['uuid']}/config").json()["config"]
    found = config["trainer"].get("strategy", "auto")
    found = found if isinstance(found, str) else found["class_path"].rpartition(".")[2]
    assert (found, config["trainer"]["devices"]) == (strategy, gpus)
    assert bool(config["model"]["init_args"]["policy"]["init_args"].get("lora")) == adapter
