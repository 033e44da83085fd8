"""The gallery of a job."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse
from pydantic import ValidationError
from starlette.datastructures import UploadFile

from lit_rl.net.strict_json import parse_json
from lit_rl.platform.answers import Json, StrictRoute, invalid
from lit_rl.platform.bodies import Line, NewSamples
from lit_rl.platform.routes.jobs import JobId
from lit_rl.platform.service import Here, Service

router = APIRouter(prefix="/api/jobs/{name}/samples", route_class=StrictRoute, tags=["samples"])
ImageName = Annotated[Line, Path(pattern=r"^\d{1,9}\.webp$")]
MAX_IMAGES, IMAGE_BYTES = 64, 1 << 20


@router.post("", status_code=201)
async def add(name: JobId, request: Request, here: Here) -> Response:
    """Take in samples: a part `samples` with JSON, {"items": [...]}, and a part for each image that an item names."""
    async with request.form(max_files=MAX_IMAGES, max_fields=1, max_part_size=4 << 20) as form:
        text, images = form.get("samples"), {key: part for key, part in form.items() if isinstance(part, UploadFile)}
        if not isinstance(text, str):
            raise invalid("samples: the part with the JSON is missing")
        data = {key: await part.read(IMAGE_BYTES + 1) for key, part in images.items()}
    if large := [key for key, found in data.items() if len(found) > IMAGE_BYTES]:
        raise invalid(f"images: {large[0][:80]!r} is larger than 1 MiB")
    try:
        body = NewSamples.model_validate(parse_json(text, numbers=False))
    except ValidationError as error:
        first = error.errors()[0]
        raise invalid(f"{'.'.join(map(str, first['loc']))[:200]}: {first['msg']}") from error
    except ValueError as error:
        raise invalid(f"samples: {error}") from error
    return Json(await run_in_threadpool(_keep, here, name, body, data), status_code=201)


def _keep(here: Service, name: str, body: NewSamples, data: dict[str, bytes]) -> dict[str, object]:
    here.records.register(name)
    accepted = here.samples.add(name, body.items, data)
    steps = sorted({item.step for item in body.items})
    here.hub.publish("sample", name, steps=steps, count=accepted)
    return {"accepted": accepted}


@router.get("")
def listed(
    name: JobId,
    here: Here,
    step: Annotated[int | None, Query(ge=0, le=1 << 53)] = None,
    sort: Literal["id", "reward", "-reward", "advantage", "-advantage"] = "id",
    source: Annotated[str | None, Query(max_length=200)] = None,
    group: Annotated[str | None, Query(max_length=200)] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 200,
) -> Response:
    """Samples of a step, of the newest where none is named, and the steps that have some."""
    here.records.find(name)
    items = here.samples.listed(name, step=step, sort=sort, source=source, group=group, limit=limit)
    return Json({"items": items, "steps": here.samples.steps(name)})


@router.get("/{step}/images/{file}")
def image(name: JobId, step: Annotated[int, Path(ge=0, le=1 << 53)], file: ImageName, here: Here) -> Response:
    """A picture."""
    return FileResponse(here.samples.image(name, step, file), media_type="image/webp", headers={"cache-control": "private, max-age=86400"})
