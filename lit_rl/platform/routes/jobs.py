"""Jobs: made, listed, changed, forgotten."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header, Path, Query, Response

from lit_rl.platform.answers import Json, StrictRoute
from lit_rl.platform.bodies import ChangedJob, NewJob
from lit_rl.platform.service import Here

router = APIRouter(prefix="/api/jobs", route_class=StrictRoute, tags=["jobs"])
JobId = Annotated[str, Path(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]


@router.post("", status_code=201)
def create(body: NewJob, here: Here, idempotency_key: Annotated[str | None, Header(max_length=200)] = None) -> Response:
    """Make a job. Its list `problems` says why it could not start as it is."""
    job = here.records.create(body, problems=[], key=idempotency_key)
    return Json(here.records.shown(job), status_code=201)


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
    return Json({"items": [here.records.shown(job) for job in found], "next_cursor": following})


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
    folder = here.records.folder(name)
    if files and folder.is_dir():
        trash = here.settings.data / "trash"
        trash.mkdir(exist_ok=True)
        folder.rename(trash / name)
    return Response(status_code=204)
