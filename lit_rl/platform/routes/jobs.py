"""Jobs: made, listed, changed, forgotten."""

from __future__ import annotations

import time
from typing import Annotated

from fastapi import APIRouter, Header, Path, Query, Response

from lit_rl.platform.answers import Json, StrictRoute, conflict
from lit_rl.platform.bodies import ChangedJob, NewJob, Resume, Stop
from lit_rl.platform.records import ENDED, Job
from lit_rl.platform.service import Here

router = APIRouter(prefix="/api/jobs", route_class=StrictRoute, tags=["jobs"])
JobId = Annotated[str, Path(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]


@router.post("", status_code=201)
def create(body: NewJob, here: Here, idempotency_key: Annotated[str | None, Header(max_length=200)] = None) -> Response:
    """Make a job. Its list `problems` says why it could not start as it is."""
    job = here.records.create(body, key=idempotency_key)
    return _made(here, job)


@router.get("")
def listed(
    here: Here,
    state: Annotated[str | None, Query(max_length=20)] = None,
    q: Annotated[str | None, Query(max_length=200)] = None,
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
    cursor: Annotated[int | None, Query(ge=0, le=1 << 53)] = None,
) -> Response:
    """Jobs, the newest first."""
    found, following = here.records.listed(state=state, q=q, limit=limit, cursor=cursor)
    return Json({"items": here.records.all_shown(found), "next_cursor": following})


@router.get("/{name}")
def one(name: JobId, here: Here) -> Response:
    """One job."""
    return Json(here.records.shown(here.records.find(name)))


@router.patch("/{name}")
def change(name: JobId, body: ChangedJob, here: Here) -> Response:
    """Change a job's name, description, notes and tags."""
    here.records.find(name)
    given = {key: value for key, value in body.model_dump().items() if value is not None}
    return Json(here.records.shown(here.records.change(name, **given)))


@router.delete("/{name}", status_code=204)
def remove(name: JobId, here: Here, files: bool = False) -> Response:
    """Forget a job. With `files` its folder is moved to the folder `trash` of the data folder."""
    here.records.remove(name)
    here.alerts.forget(name)
    folder = here.records.folder(name)
    if files and folder.is_dir():
        trash = here.settings.data / "trash"
        trash.mkdir(exist_ok=True)
        folder.rename(trash / f"{name}.{time.time_ns()}" if (trash / name).exists() else trash / name)
    return Response(status_code=204)


@router.post("/{name}/start", status_code=202)
def start(name: JobId, here: Here) -> Response:
    """Let a job wait for its GPUs; 422 with its problems where it could not start."""
    return Json(here.records.shown(here.supervisor.enqueue(name)), status_code=202)


@router.post("/{name}/stop", status_code=202)
def stop(name: JobId, here: Here, body: Stop | None = None) -> Response:
    """Stop a job, with a checkpoint unless it must be at once."""
    wish = body or Stop()
    return Json(here.records.shown(here.supervisor.stop(name, now=wish.mode == "now", grace=wish.grace_s)), status_code=202)


@router.post("/{name}/resume", status_code=201)
def resume(name: JobId, here: Here, body: Resume | None = None) -> Response:
    """A new job that continues from a checkpoint of this one."""
    parent = here.records.own(name)
    if parent["state"] not in ENDED:
        raise conflict(f"the job is {parent['state']}; stop it first", "wrong_state")
    path = here.checkpoints.chosen(name, (body or Resume()).checkpoint)
    return _made(here, here.records.derive(parent, checkpoint=str(path)))


@router.post("/{name}/clone", status_code=201)
def clone(name: JobId, here: Here) -> Response:
    """A new job with the same settings."""
    return _made(here, here.records.derive(here.records.own(name), checkpoint=None))


@router.get("/{name}/config")
def config(name: JobId, here: Here) -> Response:
    """The command of a job, its whole configuration, and the YAML that is laid over its template; 409 where somebody else started it."""
    job = here.records.own(name)
    plan = here.supervisor.plan(job)
    argv = here.supervisor.argv(job, plan)
    return Json({"argv": argv, "config": plan.config, "yaml": plan.yaml, "problems": plan.problems})


def _made(here: Here, job: Job) -> Response:
    name = str(job["uuid"])
    made = here.records.change(name, problems=here.supervisor.plan(job).problems)
    return Json(here.records.shown(made), status_code=201)
