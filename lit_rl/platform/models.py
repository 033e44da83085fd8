"""Models that can be merged, and the words of `python -m lit_rl.merge` for a request."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Literal

import sqlalchemy as sa
from pydantic import Field, StringConstraints

from lit_rl.errors import ConfigError
from lit_rl.platform.answers import invalid
from lit_rl.platform.bodies import Body, Line, PathText
from lit_rl.platform.places import modified, place_of, size_of, there, utf8
from lit_rl.platform.schema import checkpoints, jobs
from lit_rl.platform.service import Service
from lit_rl.platform.tasks import Task
from lit_rl.surgery.choosing import best
from lit_rl.surgery.formulas import Method

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
Density = Annotated[float, Field(gt=0, le=1)]
LISTED = 1000


class Input(Body):
    """One of the models, and its weight."""

    path: PathText
    weight: float = 1.0


class Merge(Body):
    """A model of several. output_name: the folder in `models` of the data folder."""

    inputs: Annotated[list[Input], Field(min_length=1, max_length=64)]
    method: Method = "linear"
    base: PathText | None = None
    density: Density = 0.5
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 31)] = 0
    output_name: Name


class Select(Body):
    """A model of the best checkpoint of a job by a result of its evaluation, or of the average of the `top_k` best.

    export: full: a whole model, to which adapters are added; lora: the adapter itself.
    """

    job: Line
    metric: Line
    mode: Literal["max", "min"] = "max"
    top_k: Annotated[int, Field(ge=1, le=64)] = 1
    export: Literal["full", "lora"] | None = None
    base: PathText | None = None
    output_name: Name | None = None


def merge_task(here: Service, body: Merge) -> Task:
    """The task of a merge. Raises ApiError for an input that is not there."""
    places = [_place(here, one.path, f"inputs.{i}.path") for i, one in enumerate(body.inputs)]
    base = _place(here, body.base, "base") if body.base else _base_of(here, places)
    weights = [format(Decimal(repr(one.weight)), "f") for one in body.inputs]  # argparse takes -1e-05 for an option
    options = ["--density", repr(body.density), "--seed", str(body.seed), *(["--dtype", body.dtype] if body.dtype else [])]
    words = _words(here, places, body.method, base, body.output_name, options)
    return Task("merge", _folder(here) / body.output_name, [*words, "--weights", *weights], body.model_dump())


def select_task(here: Service, body: Select) -> Task:
    """The task that makes a model of the best checkpoints. Raises ApiError where there are none, or no result of this name."""
    job = here.records.find(body.job)
    rows = [row for row in _checkpoints(here, body.job) if there(Path(str(row["path"])))]
    results = {str(row["path"]): _numbers(row["eval_results"]) for row in rows}
    try:
        chosen = best(results, body.metric, mode=body.mode, top=body.top_k)
    except ConfigError as error:
        raise invalid(str(error), [{"field": "metric", "problem": str(error)[:200]}]) from error
    fields = job["fields"]
    assert isinstance(fields, Mapping)
    base = _place(here, body.base, "base") if body.base else _folder_or_none(here, fields.get("model_path"))
    name = body.output_name or f"{body.job[:60]}-best"
    whole = ["--whole"] if body.export == "full" else []
    words = _words(here, [Path(path) for path in chosen], "linear", base, name, whole)
    values = [{"path": path, "value": results[path][body.metric]} for path in chosen]
    return Task("select", _folder(here) / name, words, body.model_dump() | {"chosen": values})


def listed(here: Service) -> list[dict[str, object]]:
    """Merged models, and checkpoints and exports of jobs with the job's name, the newest first."""
    found = sorted([*_merged(here), *_of_jobs(here)], key=lambda one: modified(Path(str(one["path"]))), reverse=True)[:LISTED]
    with here.store.read() as connection:
        names = {row.uuid: row.name for row in connection.execute(sa.select(jobs.c.uuid, jobs.c.name))}
    return [one | {"job_name": names.get(one["job"])} for one in found]


def _merged(here: Service) -> Iterator[dict[str, object]]:
    folder = _folder(here)
    for place in folder.iterdir() if folder.is_dir() else ():
        if place.is_dir() and not place.name.startswith(".") and utf8(place):
            yield {"path": str(place), "name": place.name, "kind": "model", "job": None, "step": None, "size_bytes": size_of(place)}


def _of_jobs(here: Service) -> Iterator[dict[str, object]]:
    told = set()
    for row in _checkpoints(here):
        place = Path(str(row["path"]))
        if place.is_absolute() and there(place):
            told.add(place)
            yield _entry(place, str(row["job"]), row["step"], str(row["kind"]), row["eval_results"])
    for place in here.records.runs.glob("*/export/*"):
        if place.is_dir() and place not in told and not place.name.startswith(".") and utf8(place):
            yield _entry(place, place.parents[1].name, None, "export", None)


def _entry(place: Path, job: str, step: object, kind: str, results: object) -> dict[str, object]:
    return {
        "path": str(place), "name": place.name, "kind": kind, "job": job, "step": step, "eval_results": results,
        "size_bytes": size_of(place),
    }  # fmt: skip


def _checkpoints(here: Service, job: str | None = None) -> Sequence[Mapping[str, object]]:
    query = sa.select(checkpoints).order_by(checkpoints.c.id.desc()).limit(LISTED)
    with here.store.read() as connection:
        rows = connection.execute(query if job is None else query.where(checkpoints.c.job == job)).mappings().all()
    return [dict(row) for row in rows]


def _words(here: Service, places: Sequence[Path], method: str, base: Path | None, name: str, options: Sequence[str]) -> list[str]:
    """Every word is an absolute path, a number or one of ours: none can be taken for an option."""
    words = [*map(str, places), "--method", method, "--out", str(_folder(here) / name), "--progress", *options]
    return words + ([] if base is None else ["--base", str(base)])


def _folder(here: Service) -> Path:
    return here.settings.data.resolve() / "models"


def _place(here: Service, path: str, field: str) -> Path:
    place = place_of(here.settings.run_root, path).absolute()
    if not there(place):
        raise invalid(f"{field}: there is nothing at {path[:200]}", [{"field": field, "problem": "there is nothing at this path"}])
    return place


def _base_of(here: Service, places: Sequence[Path]) -> Path | None:
    """The model that the job of a checkpoint started from, where all inputs are checkpoints."""
    if not all(place.suffix == ".ckpt" for place in places):
        return None
    jobs = {str(row["path"]): str(row["job"]) for row in _checkpoints(here)}
    if (job := jobs.get(str(places[0]))) is None:
        return None
    fields = here.records.find(job)["fields"]
    return _folder_or_none(here, fields.get("model_path")) if isinstance(fields, Mapping) else None


def _folder_or_none(here: Service, path: object) -> Path | None:
    place = place_of(here.settings.run_root, str(path)).absolute() if path else None
    return place if place is not None and there(place) and place.is_dir() else None


def _numbers(results: object) -> dict[str, float]:
    found = results.items() if isinstance(results, Mapping) else ()
    return {str(name): float(value) for name, value in found if isinstance(value, int | float) and not isinstance(value, bool)}
