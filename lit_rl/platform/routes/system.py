"""The server itself: whether it works, who may enter."""

from __future__ import annotations

import hmac
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Query, Response
from fastapi.responses import FileResponse
from starlette.background import BackgroundTask

from lit_rl.net.guards import ApiError
from lit_rl.platform.answers import Json, StrictRoute, invalid
from lit_rl.platform.bodies import Login
from lit_rl.platform.compare import difference
from lit_rl.platform.form import form_of
from lit_rl.platform.guard import COOKIE
from lit_rl.platform.service import Here
from lit_rl.platform.templates import algorithms, find, templates

router = APIRouter(route_class=StrictRoute, tags=["system"])
VERSION = version("lit-rl")


@router.get("/healthz")
def health(here: Here) -> Response:
    """Tell that the server and its database work."""
    with here.store.read() as connection:
        connection.exec_driver_sql("SELECT 1")
    return Json({"status": "ok", "version": VERSION, "db": "ok"})


@router.get("/health", include_in_schema=False)
def no_reward_server() -> Response:
    """Tell a reward client that it asks the wrong server: port 8000 is the default of both."""
    raise ApiError(421, "no_reward_server", "this is the platform; start reward servers on other ports and set REWARD_SERVER_URLS")


@router.post("/api/login", status_code=204)
def login(body: Login, here: Here) -> Response:
    """Let a browser in that knows the token."""
    if not hmac.compare_digest(body.token.encode(), here.settings.token.encode()):
        raise ApiError(401, "unauthorized", "this is not the token of the server; it is in the file `token` of its --data folder")
    answer = Response(status_code=204)
    answer.set_cookie(COOKIE, body.token, httponly=True, samesite="strict", max_age=30 * 86400)
    return answer


@router.get("/api/gpus")
def machine(here: Here) -> Response:
    """The GPUs and the host."""
    return Json(here.monitor.shown())


@router.get("/api/alerts")
def alerts(
    here: Here, open_only: Annotated[bool, Query(alias="open")] = False, limit: Annotated[int, Query(ge=1, le=1000)] = 200
) -> Response:
    """Alerts of all jobs and of the machine, the newest first; with `open` those whose reason is not gone."""
    return Json(here.alerts.of_all(open_only=open_only, limit=limit))


@router.get("/api/compare")
def compare(here: Here, jobs: Annotated[str, Query(max_length=2000)]) -> Response:
    """Lists the keys in which the configurations of jobs differ, and the newest of their canonical metrics."""
    names = list(dict.fromkeys(filter(None, jobs.split(","))))
    if not 1 <= len(names) <= 12:
        raise invalid("jobs: give 1 to 12 ids with commas between them")
    found = {name: here.records.find(name) for name in names}
    configs = {name: here.supervisor.plan(job).config if job["fields"] else {} for name, job in found.items()}
    differ = difference(configs)
    differ.pop("run.name", None)  # a job's own folder, which says nothing
    return Json({"config_diff": differ, "summary": {name: here.records.last_metrics(name) for name in names}})


@router.get("/api/algorithms")
def known(here: Here) -> Response:
    """The algorithms, each with the run files that a job may begin with."""
    root = here.settings.run_root
    return Json([{"algorithm": name, "templates": templates(root, name)} for name in algorithms(root)])


@router.get("/api/algorithms/{algorithm}/form")
def form(algorithm: str, here: Here, template: Annotated[str | None, Query(max_length=4096)] = None) -> Response:
    """The options of the method and the datamodule of a run file, read off their signatures: for `overrides` of a job."""
    try:
        path = find(here.settings.run_root, algorithm, template)
    except ValueError as error:
        raise invalid(str(error)) from error
    return Json(form_of(path))


@router.get("/api/backup")
def backup(here: Here) -> Response:
    """A copy of the database, made while the server works."""
    folder = tempfile.TemporaryDirectory(dir=here.settings.data)
    path = Path(folder.name) / "platform.db"
    here.store.backup(path)
    return FileResponse(path, media_type="application/octet-stream", filename="platform.db", background=BackgroundTask(folder.cleanup))
