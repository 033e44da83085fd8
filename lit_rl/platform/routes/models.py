"""Models: what there is, merges of them, and the best checkpoint of a job."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Response

from lit_rl.platform import models
from lit_rl.platform.answers import Json, StrictRoute
from lit_rl.platform.models import Merge, Select
from lit_rl.platform.service import Here

router = APIRouter(prefix="/api", route_class=StrictRoute, tags=["models"])


@router.get("/models")
def listed(here: Here) -> Response:
    """Models, exports and checkpoints that can be merged, the newest first."""
    return Json({"items": models.listed(here)})


@router.post("/models/merge", status_code=202)
def merge(body: Merge, here: Here) -> Response:
    """Begin to make one model of several."""
    return Json(here.tasks.start(models.merge_task(here, body)).shown(), status_code=202)


@router.post("/models/select", status_code=202)
def select(body: Select, here: Here) -> Response:
    """Begin to make a model of the best checkpoints of a job."""
    return Json(here.tasks.start(models.select_task(here, body)).shown(), status_code=202)


@router.get("/tasks/{name}")
def task(name: Annotated[str, Path(max_length=64)], here: Here) -> Response:
    """Tells the state and the progress of a task."""
    return Json(here.tasks.find(name).shown())
