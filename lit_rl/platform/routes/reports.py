"""Reports of runs and their reading: metrics, GPUs, checkpoints, states."""

from __future__ import annotations

import time
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Response
from fastapi.responses import FileResponse

from lit_rl.net.guards import ApiError
from lit_rl.platform.answers import Json, StrictRoute
from lit_rl.platform.bodies import Line, NewCheckpoint, NewGpuSamples, NewPoints, NewStatus
from lit_rl.platform.compare import as_csv
from lit_rl.platform.metrics import MAX_ROWS, Point
from lit_rl.platform.routes.jobs import JobId
from lit_rl.platform.service import Here

router = APIRouter(prefix="/api/jobs/{name}", route_class=StrictRoute, tags=["reports"])
Keys = Annotated[str | None, Query(max_length=20_000)]
Step = Annotated[int | None, Query(ge=0, le=1 << 53)]


@router.post("/metrics", status_code=202)
def add_metrics(name: JobId, body: NewPoints, here: Here) -> Response:
    """Take in metrics. A job that nobody created is registered as one that somebody else started."""
    here.reports.metrics(name, [Point(p.step, p.numbers(), p.epoch, p.ts or time.time()) for p in body.points])
    return Json({"accepted": len(body.points)}, status_code=202)


@router.get("/metrics")
def rows(
    name: JobId,
    here: Here,
    split: Literal["train", "eval", "all"] = "train",
    since_step: Step = None,
    limit: Annotated[int, Query(ge=1, le=MAX_ROWS)] = MAX_ROWS,
    keys: Keys = None,
) -> Response:
    """One row for each step."""
    here.records.find(name)
    words = _words(keys)
    most = min(limit, here.metrics.most_rows(name, words))
    found = here.metrics.rows(name, split=split, since=-1 if since_step is None else since_step, limit=most + 1, keys=words)
    kept = found[-most:] if since_step is None else found[:most]
    return Json(kept, headers={"x-truncated": "true"} if len(found) > most else None)


@router.get("/metrics.csv")
def table(name: JobId, here: Here) -> Response:
    """All rows as a table for a spreadsheet."""
    here.records.find(name)
    headers = {"content-disposition": f'attachment; filename="{name}.csv"'}
    return Response(as_csv(here.metrics.rows(name, split="all")), media_type="text/csv", headers=headers)


@router.get("/series")
def series(
    name: JobId,
    here: Here,
    keys: Keys = None,
    points: Annotated[int, Query(ge=1, le=10_000)] = 1000,
    first: Annotated[int | None, Query(alias="from", ge=0, le=1 << 53)] = None,
    last: Annotated[int | None, Query(alias="to", ge=0, le=1 << 53)] = None,
) -> Response:
    """Curves, of at most so many buckets."""
    here.records.find(name)
    return Json(here.metrics.series(name, _words(keys), buckets=points, first=first, last=last))


@router.post("/gpu", status_code=202)
def add_gpu(name: JobId, body: NewGpuSamples, here: Here) -> Response:
    """Take in what a run says of its GPUs."""
    here.reports.gpus(name, [sample.model_dump() | {"ts": sample.ts or time.time()} for sample in body.samples])
    return Json({"accepted": len(body.samples)}, status_code=202)


@router.get("/gpu")
def gpu(name: JobId, here: Here, minutes: Annotated[float, Query(gt=0, le=1440)] = 60.0) -> Response:
    """The GPUs of a job in its last minutes: what the run reports, and what the service measures of the GPUs that it gave."""
    job = here.records.find(name)
    ids = job["gpu_ids"]
    assert isinstance(ids, list)
    return Json(here.gpu_history.of(name, ids, since=time.time() - 60 * minutes))


@router.post("/checkpoints", status_code=201)
def add_checkpoint(name: JobId, body: NewCheckpoint, here: Here) -> Response:
    """Take in a checkpoint."""
    return Json(here.reports.checkpoint(name, step=body.step, path=body.path, eval_results=body.eval_results), status_code=201)


@router.get("/checkpoints")
def checkpoints(name: JobId, here: Here) -> Response:
    """The checkpoints of a job by step."""
    here.records.find(name)
    return Json(here.checkpoints.listed(name))


@router.get("/checkpoints/{checkpoint}/download")
def download(name: JobId, checkpoint: Line, here: Here) -> Response:
    """The file of a checkpoint in the job's folder."""
    here.records.find(name)
    path = here.checkpoints.file(name, checkpoint)
    return FileResponse(path, media_type="application/octet-stream", filename=path.name, content_disposition_type="attachment")


@router.post("/status")
def add_status(name: JobId, body: NewStatus, here: Here) -> Response:
    """Take in a state that a run reports; for jobs of this server its process decides."""
    return Json(here.records.shown(here.reports.status(name, body.status, body.message, last=body.max_steps)))


@router.get("/alerts")
def alerts(name: JobId, here: Here) -> Response:
    """The findings of the rules, the oldest first."""
    here.records.find(name)
    return Json(here.alerts.listed(name))


@router.get("/logs")
def logs(
    name: JobId,
    here: Here,
    stream: Literal["stdout"] = "stdout",
    offset: Annotated[int, Query(ge=-(1 << 40), le=1 << 53)] = 0,
    limit: Annotated[int, Query(ge=1, le=262_144)] = 65_536,
) -> Response:
    """A part of what the job printed, cut at ends of lines. A negative offset counts from the end."""
    here.records.find(name)
    return Json(here.logs.read(name, offset=offset, limit=limit))


def _words(text: str | None) -> list[str]:
    words = [word for word in (text or "").split(",") if word]
    if len(words) > 512:
        raise ApiError(422, "validation_error", "keys: at most 512 metrics at a time")
    return words
