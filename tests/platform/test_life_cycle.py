"""From created to its end: jobs start, stop with a checkpoint, continue, wait for GPUs, and survive their server."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from fastapi.testclient import TestClient
from served_platform import asked

from lit_rl.platform.processes import Ending, verdict

SECONDS = float(os.environ.get("SVC_S", 120.0))


@pytest.fixture
def jobs(tmp_path: Path, root: Path) -> Iterator[TestClient]:
    with asked(tmp_path, run_root=root, gpu_ids=(), cpu_jobs=2) as client:
        yield client
        end_all(client)


def end_all(client: TestClient) -> None:
    for job in client.get("/api/jobs").json()["items"]:
        client.post(f"/api/jobs/{job['uuid']}/stop", json={"mode": "now"})
        until(lambda uuid=job["uuid"]: state(client, uuid) in ("created", "stopped", "succeeded", "failed", "stale"))


def until(true: Callable[[], Any]) -> Any:
    end = time.monotonic() + SECONDS
    while not (found := true()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


def new(client: TestClient, **more: Any) -> str:
    body = {"name": "sort", "algorithm": "grpo", "template": "configs/demo/grpo_sort.yaml", "model_path": "./model"}
    body |= {"train_data_path": "rows.jsonl", "eval_data_path": "rows.jsonl", "num_gpus": 0, **more}
    answer = client.post("/api/jobs", json=body)
    assert answer.status_code == 201 and answer.json()["problems"] == [], answer.text
    return str(answer.json()["uuid"])


def state(client: TestClient, uuid: str) -> str:
    return str(client.get(f"/api/jobs/{uuid}").json()["state"])


def folder_of(client: TestClient, uuid: str) -> Path:
    return Path(client.get(f"/api/jobs/{uuid}").json()["run_dir"])


def started(client: TestClient, uuid: str) -> Path:
    answer = client.post(f"/api/jobs/{uuid}/start")
    assert answer.status_code == 202, answer.text
    folder = folder_of(client, uuid)
    until(lambda: "sees" in printed(folder))
    return folder


def printed(folder: Path) -> str:
    log = folder / "stdout.log"
    return log.read_text() if log.exists() else ""


def starts(folder: Path) -> list[int]:
    return [int(line) for line in (folder / "starts").read_text().split()] if (folder / "starts").exists() else []


def test_a_job_runs_to_its_end(jobs: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD_", "kept out")
    uuid = new(jobs)
    folder = started(jobs, uuid)
    assert state(jobs, uuid) == "starting" and jobs.delete(f"/api/jobs/{uuid}").status_code == 409
    assert jobs.post(f"/api/jobs/{uuid}/start").json()["error"]["code"] == "wrong_state"
    (folder / "finish").write_text("0")
    until(lambda: state(jobs, uuid) == "succeeded")
    job = jobs.get(f"/api/jobs/{uuid}").json()
    assert job["exit"] == {"returncode": 0, "signal": None, "reason": None} and job["ended_at"]
    assert f"sees  {uuid} None" in (folder / "stdout.log").read_text()
    assert jobs.delete(f"/api/jobs/{uuid}?files=true").status_code == 204 and not folder.exists()


@pytest.mark.slow
def test_a_value_of_the_wrong_type_is_told_before_the_start(tmp_path: Path, root: Path) -> None:
    """The sentence is the command line's own."""
    with asked(tmp_path, gpu_ids=()) as client:
        rows, wrong = str(root / "rows.jsonl"), {"model.init_args.group_size": "many"}
        uuid = new(client, model_path=str(root / "model"), train_data_path=rows, eval_data_path=rows, overrides=wrong)
        refused = client.post(f"/api/jobs/{uuid}/start")
        assert refused.status_code == 422 and state(client, uuid) == "created"
    (problem,) = refused.json()["error"]["details"]
    assert problem["field"] == "overrides"
    assert re.fullmatch(r"job.yaml:\d+: group_size is 'many'; expected a whole number", problem["problem"])


def test_a_failure_says_why(jobs: TestClient) -> None:
    uuid = new(jobs)
    (started(jobs, uuid) / "finish").write_text("2")
    until(lambda: state(jobs, uuid) == "failed")
    assert jobs.get(f"/api/jobs/{uuid}").json()["exit"]["reason"] == "exit code 2: error: run.yaml:3: the test says so"


def test_a_stopped_job_continues_from_its_checkpoint(jobs: TestClient) -> None:
    uuid = new(jobs)
    folder = started(jobs, uuid)
    stopping = jobs.post(f"/api/jobs/{uuid}/stop")
    assert stopping.status_code == 202 and stopping.json()["state"] in ("stopping", "stopped")
    until(lambda: state(jobs, uuid) == "stopped")
    assert jobs.post(f"/api/jobs/{uuid}/stop").status_code == 202  # asked again, the same answer
    resumed = jobs.post(f"/api/jobs/{uuid}/resume", json={"checkpoint": "last"}).json()
    assert resumed["parent_uuid"] == uuid and resumed["problems"] == []
    assert jobs.get(f"/api/jobs/{resumed['uuid']}/config").json()["argv"][-2:] == ["--ckpt_path", str(folder / "checkpoints/last.ckpt")]
    assert jobs.post(f"/api/jobs/{uuid}/resume", json={"checkpoint": "best"}).status_code == 422
    assert jobs.post(f"/api/jobs/{uuid}/clone").json()["checkpoint"] is None


def test_jobs_wait_for_gpus_in_the_order_in_which_they_came(tmp_path: Path, root: Path) -> None:
    with asked(tmp_path, run_root=root, gpu_ids=(0, 1)) as client:
        first, second, third = (new(client, num_gpus=n) for n in (1, 2, 1))
        folder = started(client, first)
        for uuid in (second, third):
            client.post(f"/api/jobs/{uuid}/start")
        client.app.state.service.supervisor.look()  # type: ignore[attr-defined]
        assert (state(client, second), state(client, third)) == ("queued", "queued")  # the third must not pass the second
        (folder / "finish").write_text("0")
        until(lambda: state(client, second) == "starting")
        assert client.get(f"/api/jobs/{second}").json()["gpu_ids"] == [0, 1]
        until(lambda: "sees 0,1 " in printed(folder_of(client, second)))
        assert client.post(f"/api/jobs/{third}/stop").json()["state"] == "stopped"
        end_all(client)


def test_another_server_finds_the_jobs_as_they_are(tmp_path: Path, root: Path) -> None:
    """One goes on, one ended while nobody looked, one whose processes are gone; none is started twice."""
    with asked(tmp_path, run_root=root, gpu_ids=(), cpu_jobs=3) as client:
        uuids = [new(client) for _ in range(3)]
        folders = [started(client, uuid) for uuid in uuids]
    (folders[1] / "finish").write_text("7")
    os.kill(json.loads((folders[2] / "runner.json").read_text())["shim"]["pid"], signal.SIGKILL)
    os.kill(starts(folders[2])[0], signal.SIGKILL)
    until(lambda: (folders[1] / "exit.json").exists())
    with asked(tmp_path, run_root=root, gpu_ids=(), cpu_jobs=3) as client:
        until(lambda: state(client, uuids[2]) == "failed")
        assert state(client, uuids[0]) == "starting" and state(client, uuids[1]) == "failed"
        assert client.get(f"/api/jobs/{uuids[1]}").json()["exit"]["returncode"] == 7
        assert "lost" in client.get(f"/api/jobs/{uuids[2]}").json()["exit"]["reason"]
        assert [len(starts(folder)) for folder in folders] == [1, 1, 1]
        end_all(client)
        assert state(client, uuids[0]) in ("stopped", "failed")


@pytest.mark.parametrize("mode", ["graceful", "now"])
def test_a_job_whose_folder_was_removed_stops_also_by_another_server(tmp_path: Path, root: Path, mode: str) -> None:
    """It is known by the list of processes, as all its files are gone; it is neither lost nor started again meanwhile."""
    with asked(tmp_path, run_root=root, gpu_ids=(), cpu_jobs=1) as client:
        uuid = new(client)
        folder = started(client, uuid)
        (pid,) = starts(folder)
    shutil.rmtree(folder)
    (folder / "checkpoints").mkdir(parents=True)  # as a run that goes on makes it
    with asked(tmp_path, run_root=root, gpu_ids=(), cpu_jobs=1) as client:
        assert state(client, uuid) == "starting" and psutil.pid_exists(pid)
        assert client.post(f"/api/jobs/{uuid}/stop", json={"mode": mode}).status_code == 202
        until(lambda: state(client, uuid) == "stopped")
        assert not psutil.pid_exists(pid)


def test_a_job_that_ends_after_its_folder_was_removed_says_so(jobs: TestClient) -> None:
    uuid = new(jobs)
    folder = started(jobs, uuid)
    jobs.post(f"/api/jobs/{uuid}/metrics", json={"points": [{"step": 1, "metrics": {"x": 1.0}}]})
    (pid,) = starts(folder)
    shutil.rmtree(folder)
    os.kill(pid, signal.SIGKILL)
    until(lambda: state(jobs, uuid) == "failed")
    assert "were removed from its folder" in jobs.get(f"/api/jobs/{uuid}").json()["exit"]["reason"]


def test_a_job_that_is_ended_at_once_is_stopped_and_one_that_had_its_time_has_failed(jobs: TestClient) -> None:
    for wish, end in (({"mode": "now"}, "stopped"), ({"grace_s": 0.2}, "failed")):
        uuid = new(jobs, name="deaf")
        folder = started(jobs, uuid)
        os.kill(starts(folder)[0], signal.SIGSTOP)  # hears no SIGTERM
        jobs.post(f"/api/jobs/{uuid}/stop", json=wish)
        until(lambda uuid=uuid: state(jobs, uuid) in ("stopped", "failed"))
        assert state(jobs, uuid) == end, jobs.get(f"/api/jobs/{uuid}").json()["exit"]


def test_the_ending_is_decided_by_intent_marker_and_code() -> None:
    def of(end: Ending | None, *, asked: bool = False, done: bool = False) -> str:
        return verdict(end, asked=asked, done=done)[0]

    assert of(Ending(0), done=True) == "succeeded" and of(Ending(0)) == "failed"  # Lightning exits with 0 after SIGTERM
    assert of(Ending(0), asked=True) == of(Ending(143)) == of(Ending(143, "SIGTERM"), asked=True) == "stopped"
    assert of(Ending(1), asked=True) == "stopped" and of(Ending(1)) == of(Ending(137, "SIGKILL")) == of(None) == "failed"
    assert of(None, done=True) == "succeeded" and of(Ending(1), done=True) == "failed"
    assert verdict(Ending(137, "SIGKILL"), asked=True, done=False, killed=True)[1].startswith("stop_timeout")  # type: ignore[union-attr]
