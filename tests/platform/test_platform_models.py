"""Merges and choices over REST: tasks with progress, in a process of their own."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import toy_text
from fastapi.testclient import TestClient
from safetensors.torch import load_file
from served_platform import GUIDE_JOB, asked

from lit_rl.merge import main
from lit_rl.platform.models import Select, select_task
from lit_rl.platform.schema import checkpoints
from lit_rl.platform.tasks import Task, Tasks
from lit_rl.policies.weights.lora import LoraSettings


def ended(platform: TestClient, task: dict[str, Any]) -> dict[str, Any]:
    """A task when it is over."""
    end = time.monotonic() + 200
    while time.monotonic() < end:
        found: dict[str, Any] = platform.get(f"/api/tasks/{task['id']}").json()
        if found["state"] in ("succeeded", "failed"):
            return found
        time.sleep(0.1)
    raise AssertionError(f"still {found}")


def service(platform: TestClient) -> Any:
    application: Any = platform.app
    return application.state.service


@pytest.mark.slow
def test_models_are_merged_in_a_process_of_their_own(platform: TestClient, tmp_path: Path) -> None:
    """The result is listed, and its name is taken; a task that fails says why."""
    a, b = (toy_text.model_folder(tmp_path / name, seed=seed) for seed, name in enumerate("ab"))
    inputs = [{"path": str(a), "weight": 1.0}, {"path": str(b), "weight": -0.5}]
    begun = platform.post("/api/models/merge", json={"inputs": inputs, "method": "linear", "output_name": "mix"})
    assert begun.status_code == 202 and begun.json()["kind"] == "merge" and begun.json()["output"] is None
    assert platform.post("/api/models/merge", json={"inputs": inputs, "output_name": "mix"}).status_code == 409
    done = ended(platform, begun.json())
    assert (done["state"], done["progress"], done["message"]) == ("succeeded", 1.0, "")
    first, second, mix = (load_file(folder / "model.safetensors")["lm_head.weight"] for folder in (a, b, Path(done["output"])))
    assert (mix - (2 * first - second)).abs().max() < 1e-5
    assert [(one["path"], one["kind"]) for one in platform.get("/api/models").json()["items"]] == [(done["output"], "model")]
    failed = service(platform).tasks.start(Task("merge", tmp_path / "none", ["--method"], {}))
    told = ended(platform, failed.shown())
    assert (told["state"], told["output"]) == ("failed", None) and "--method: expected one argument" in told["message"]


def test_the_best_checkpoint_becomes_a_model(platform: TestClient, tmp_path: Path) -> None:
    """The better of two by its evaluation, by the words that its process gets; an adapter is added to the base of its job."""
    base = toy_text.model_folder(tmp_path / "base")
    a = toy_text.model_folder(tmp_path / "a", seed=1)
    policy = toy_text.policy(base, lora=LoraSettings(rank=2))
    policy.load()
    (adapter := tmp_path / "adapter").mkdir()
    policy.save(adapter, {name: p.detach() + 0.1 for name, p in policy.trainable()})
    job = platform.post("/api/jobs", json=GUIDE_JOB | {"model_path": str(base)}).json()["uuid"]
    row = {"job": job, "kind": "export", "created_at": 1.0}
    rows = [row | {"step": i, "path": str(place), "eval_results": {"x": float(i), "y": -float(i)}} for i, place in enumerate((adapter, a))]
    here = service(platform)
    with here.store.write() as connection:
        connection.execute(sa.insert(checkpoints), rows)
    found = {}
    for metric in "xy":
        task = select_task(here, Select(job=job, metric=metric, export="full", output_name=metric))
        main(list(task.words))
        found[metric] = load_file(task.output / "model.safetensors")
    weights = [load_file(folder / "model.safetensors") for folder in (a, base)]
    assert all((found["x"][name] == weights[0][name]).all() for name in weights[0])
    changed = {name for name in weights[1] if not (found["y"][name] == weights[1][name]).all()}
    assert changed == {name for name in weights[1] if "_proj" in name and name.endswith("weight")}
    told = [one for one in platform.get("/api/models").json()["items"] if one["kind"] == "export"]
    assert {one["job_name"] for one in told} == {GUIDE_JOB["name"]}
    listed = {one["path"]: one["eval_results"] for one in told}
    assert listed == {str(adapter): {"x": 0.0, "y": 0.0}, str(a): {"x": 1.0, "y": -1.0}}


def test_requests_that_cannot_be_done_are_refused(platform: TestClient, tmp_path: Path) -> None:
    """A name or a path is never an option of the command, and leads nowhere else."""
    job = platform.post("/api/jobs", json=GUIDE_JOB).json()["uuid"]
    inputs = [{"path": str(tmp_path)}]
    for body, status in (
        ({"inputs": inputs, "output_name": "../up"}, 422),
        ({"inputs": inputs, "output_name": "--out"}, 422),
        ({"inputs": inputs, "output_name": "a", "method": "mean"}, 422),
        ({"inputs": [{"path": str(tmp_path / "gone")}], "output_name": "a"}, 422),
        ({"inputs": [{"path": "--best"}], "output_name": "a"}, 422),
        ({"inputs": [], "output_name": "a"}, 422),
        ({"inputs": inputs, "output_name": "a", "density": 0}, 422),
        ({"inputs": inputs, "output_name": "a", "command": "x"}, 422),
    ):
        assert platform.post("/api/models/merge", json=body).status_code == status, body
    told = platform.post("/api/models/select", json={"job": job, "metric": "gsm8k"})
    assert told.status_code == 422 and "in none of the 0 checkpoints" in told.json()["error"]["message"]
    assert platform.post("/api/models/select", json={"job": "nobody", "metric": "x"}).status_code == 404
    assert platform.get("/api/tasks/nothing").json()["error"]["code"] == "task_not_found"
    assert platform.get("/api/models").json() == {"items": []}


def test_another_server_knows_the_tasks_and_the_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was done stays done, what was not is said to be lost, and the selected checkpoint is the best one, whatever its first result."""
    with asked(tmp_path) as client:
        here = service(client)
        for step in (1, 2):
            place = toy_text.model_folder(tmp_path / f"{step}", seed=step)
            body = {"step": step, "path": str(place), "eval_results": {"x": float(step), "y": -float(step)}}
            assert client.post("/api/jobs/j/checkpoints", json=body).status_code == 201
        marks = [[row["is_best"] for row in client.get("/api/jobs/j/checkpoints").json()]]
        done, lost, made = (select_task(here, Select(job="j", metric="y", output_name=name)) for name in ("done", "lost", "made"))
        monkeypatch.setattr(here.tasks, "_worker", threading.current_thread())  # nobody works
        monkeypatch.setattr(here.tasks, "close", lambda: None)
        for task in (done, lost, made):
            here.tasks.start(task)
        done.state, done.progress, done.ended_at = "succeeded", 1.0, 1.0
        here.tasks._keep(done)
        here._made(done)
        made.output.mkdir(parents=True)
    with asked(tmp_path) as client:
        found = [client.get(f"/api/tasks/{task.id}").json() for task in (done, lost, made)]
        assert [task["state"] for task in found] == ["succeeded", "failed", "succeeded"]
        assert found[1]["message"].startswith("lost: ") and found[0]["details"]["metric"] == "y" and found[1]["output"] is None
        marks.append([row["is_best"] for row in client.get("/api/jobs/j/checkpoints").json()])
    assert marks == [[False, True], [True, False]]


def test_the_end_of_the_server_ends_its_task(platform: TestClient, tmp_path: Path) -> None:
    """The process that runs is terminated; the one that waits never starts."""
    toy_text.model_folder(tmp_path / "a")
    for name in ("x", "y"):
        platform.post("/api/models/merge", json={"inputs": [{"path": str(tmp_path / "a")}], "output_name": name})
    tasks: Tasks = service(platform).tasks
    tasks.close()
    assert not (tmp_path / "data/models/y").exists()
