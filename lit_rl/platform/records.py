"""Jobs as rows of the database, and as the JSON that the service answers."""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import orjson
import sqlalchemy as sa

from lit_rl.platform.answers import conflict, not_found, text_of
from lit_rl.platform.bodies import NewJob
from lit_rl.platform.schema import alerts, jobs, metric_keys, points, steps
from lit_rl.platform.store import Store

ACTIVE = ("queued", "starting", "running", "stopping")
"""States of jobs that have, or wait for, a process. An external job is `running` too, and `stale` while it is silent."""

ENDED = ("stopped", "succeeded", "failed")
FIELDS = (
    "algorithm", "template", "model_path", "model_size", "train_data_path", "eval_data_path", "num_gpus", "learning_rate", "batch_size",
    "num_epochs", "context_length", "rollout_n", "kl_coef", "overrides",
)  # fmt: skip
CANONICAL = ("policy_loss", "value_loss", "reward_mean", "kl_divergence", "entropy", "clip_fraction")
"""Metrics that every method reports under the same names, where it has such a thing."""

DIGEST = 1 + 64
"""Characters that follow the key of a request where it is kept: a colon, and the SHA-256 of the body."""

STALLED = "stalled"
"""The rule of alerts for jobs whose steps do not come."""

Job = Mapping[str, object]


class Reached(NamedTuple):
    """A step that a run has reported, and when, in seconds since 1970."""

    step: int
    ts: float


class Records:
    """The jobs of a store. run_root: the folder that has the folder of each run."""

    def __init__(self, store: Store, runs: Path) -> None:
        self.store, self.runs = store, runs

    def folder(self, name: str) -> Path:
        """The folder of a job's run."""
        return self.runs / name

    def create(self, body: NewJob, *, key: str | None = None) -> Job:
        """A new job. The same idempotency key and body make one job; the same key with another body is a conflict."""
        asked = body.model_dump()
        if key is not None:
            digest = hashlib.sha256(orjson.dumps(asked, option=orjson.OPT_SORT_KEYS)).hexdigest()
            key = f"{key[:200]}:{digest}"
        told = {name: asked[name] for name in ("name", "description", "notes", "tags")}
        return self._insert(key, **told, fields={name: asked[name] for name in FIELDS})

    def derive(self, parent: Job, *, checkpoint: str | None) -> Job:
        """A new job with the settings of another, which continues from a checkpoint of it, or begins anew."""
        copied = {name: parent[name] for name in ("name", "description", "notes", "tags", "fields")}
        return self._insert(None, **copied, parent_uuid=parent["uuid"], checkpoint=checkpoint)

    def register(self, name: str) -> Job:
        """The job of this id; one that nobody created is made as a run that somebody else started (source external)."""
        with self.store.write() as connection:
            row = connection.execute(sa.select(jobs).where(jobs.c.uuid == name)).mappings().first()
            if row is None:
                now = time.time()
                values = _defaults(now) | {"uuid": name, "name": name, "source": "external", "state": "running", "started_at": now}
                connection.execute(sa.insert(jobs).values(values))
                row = connection.execute(sa.select(jobs).where(jobs.c.uuid == name)).mappings().one()
        return dict(row)

    def find(self, name: str) -> Job:
        """The job of an id. Raises ApiError 404."""
        with self.store.read() as connection:
            row = connection.execute(sa.select(jobs).where(jobs.c.uuid == name)).mappings().first()
        if row is None:
            raise not_found("job", name)
        return dict(row)

    def own(self, name: str) -> Job:
        """The job of an id, which this server starts and stops. Raises ApiError 404, and 409 for a run that somebody else started."""
        job = self.find(name)
        if job["source"] != "platform":
            raise conflict("somebody else started this run: start, stop and configure it there", "external_job")
        return job

    def listed(self, *, state: str | None, q: str | None, limit: int, cursor: int | None) -> tuple[list[Job], str | None]:
        """Jobs, the newest first, and where the next page begins. q: words of the name, the id or the description."""
        query = sa.select(jobs).order_by(jobs.c.seq.desc()).limit(limit + 1)
        query = query if state is None else query.where(jobs.c.state == state)
        query = query if cursor is None else query.where(jobs.c.seq < cursor)
        if q:
            query = query.where(sa.or_(*(column.contains(q, autoescape=True) for column in (jobs.c.name, jobs.c.uuid, jobs.c.description))))
        with self.store.read() as connection:
            rows: list[Job] = [dict(row) for row in connection.execute(query).mappings()]
        return rows[:limit], str(rows[limit - 1]["seq"]) if len(rows) > limit else None

    def in_states(self, states: Collection[str], source: str = "platform") -> list[Job]:
        """Jobs in one of these states, the oldest request first."""
        query = sa.select(jobs).where(jobs.c.state.in_(states), jobs.c.source == source).order_by(jobs.c.queued_at, jobs.c.seq)
        with self.store.read() as connection:
            return [dict(row) for row in connection.execute(query).mappings()]

    def change(self, name: str, **values: object) -> Job:
        """The job with other values. Raises ApiError 404."""
        with self.store.write() as connection:
            if values:
                connection.execute(sa.update(jobs).where(jobs.c.uuid == name).values(values))
        return self.find(name)

    def move(self, name: str, before: Iterable[str], state: str, **values: object) -> bool:
        """Put a job into another state if it is in one of `before`. False where somebody else was first."""
        query = sa.update(jobs).where(jobs.c.uuid == name, jobs.c.state.in_(tuple(before))).values(state=state, **values)
        with self.store.write() as connection:
            return bool(connection.execute(query).rowcount)

    def silent(self, name: str, since: float) -> bool:
        """Note that a running job has not reported since a moment. False where it has, or runs no more."""
        query = sa.update(jobs).where(jobs.c.uuid == name, jobs.c.state == "running")
        query = query.where(sa.func.coalesce(jobs.c.reported_at, jobs.c.started_at) < since).values(state="stale")
        with self.store.write() as connection:
            return bool(connection.execute(query).rowcount)

    def remove(self, name: str) -> None:
        """Forget a job. Raises ApiError 404, and 409 while it is active."""
        keys = sa.select(metric_keys.c.id).where(metric_keys.c.job == name)
        with self.store.write() as connection:
            job = connection.execute(sa.select(jobs.c.state, jobs.c.source).where(jobs.c.uuid == name)).one_or_none()
            if job is None:
                raise not_found("job", name)
            if job.state in ACTIVE and job.source == "platform":
                raise conflict(f"the job is {job.state}: stop it first", "job_active")
            connection.execute(sa.delete(points).where(points.c.key.in_(keys)))
            for table in jobs.metadata.sorted_tables:
                if "job" in table.c:
                    connection.execute(sa.delete(table).where(table.c.job == name))
            connection.execute(sa.delete(jobs).where(jobs.c.uuid == name))

    def last_metrics(self, name: str) -> dict[str, float | None]:
        """The newest value of each canonical metric that the job has reported."""
        with self.store.read() as connection:
            return _last_metrics(connection, [name])[name]

    def shown(self, job: Job) -> dict[str, object]:
        """The job as the service answers it."""
        return self.all_shown([job])[0]

    def all_shown(self, found: Sequence[Job]) -> list[dict[str, object]]:
        """Jobs as the service answers them, by as many queries as for one."""
        names = [str(job["uuid"]) for job in found]
        stalled = sa.select(alerts.c.job).where(alerts.c.job.in_(names), alerts.c.rule == STALLED, alerts.c.ended_at.is_(None))
        with self.store.read() as connection:
            newest, spans = _last_metrics(connection, names), _spans(connection, names)
            silent = set(connection.execute(stalled).scalars())
        return [
            self._shown(job) | {
                "progress": progress(job, spans.get(name)), "last_metrics": newest[name],
                "stalled": job["state"] == "running" and name in silent,
            }
            for name, job in zip(names, found, strict=True)
        ]  # fmt: skip

    def _shown(self, job: Job) -> dict[str, object]:
        fields = job["fields"]
        assert isinstance(fields, dict)
        asked = {name: fields.get(name) for name in FIELDS}
        times = {name: text_of(job[name]) for name in ("created_at", "queued_at", "started_at", "ended_at", "stop_requested_at")}  # type: ignore[arg-type]
        plain = ("uuid", "name", "description", "notes", "tags", "state", "source", "problems", "gpu_ids", "parent_uuid", "checkpoint")
        end = {"returncode": job["returncode"], "signal": job["signal"], "reason": job["reason"]}
        return {**{name: job[name] for name in plain}, **asked, **times, "run_dir": str(self.folder(str(job["uuid"]))), "exit": end}

    def _insert(self, idempotency_key: str | None, **values: object) -> Job:
        """A new row, or the one that the same key has made: looked for and written at once, so that two requests make one job."""
        name = str(uuid.uuid4())
        with self.store.write() as connection:
            if idempotency_key is not None and (before := _keyed(connection, idempotency_key)) is not None:
                return before
            more = {"uuid": name, "idempotency_key": idempotency_key}
            connection.execute(sa.insert(jobs).values(_defaults(time.time()) | values | more))
        return self.find(name)


def _last_metrics(connection: sa.Connection, names: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """The newest values of the canonical metrics of jobs."""
    inner = points.alias()
    newest = sa.select(sa.func.max(inner.c.step)).where(inner.c.key == metric_keys.c.id).correlate(metric_keys).scalar_subquery()
    query = sa.select(metric_keys.c.job, metric_keys.c.name, points.c.value).join(points, points.c.key == metric_keys.c.id)
    query = query.where(metric_keys.c.job.in_(names), metric_keys.c.name.in_(CANONICAL), points.c.step == newest)
    found: dict[str, dict[str, float | None]] = {name: {} for name in names}
    for job, key, value in connection.execute(query):
        found[job][key] = value
    return found


def _spans(connection: sa.Connection, names: Sequence[str]) -> dict[str, Sequence[Reached]]:
    """The first and the newest step of jobs that have reported one."""
    ends = [
        sa.select(column).where(steps.c.job == jobs.c.uuid).order_by(order).limit(1).correlate(jobs).scalar_subquery()
        for order in (steps.c.step, steps.c.step.desc())
        for column in (steps.c.step, steps.c.ts)
    ]
    rows = connection.execute(sa.select(jobs.c.uuid, *ends).where(jobs.c.uuid.in_(names)))
    return {name: (Reached(first, began), Reached(last, now)) for name, first, began, last, now in rows if first is not None}


def _keyed(connection: sa.Connection, key: str) -> Job | None:
    """Returns the job that this key and body have made, or None. Raises ApiError 409 for the key with another body."""
    word, digest = key[:-DIGEST], key[-DIGEST:]
    column = jobs.c.idempotency_key
    query = sa.select(jobs).where(sa.func.substr(column, 1, sa.func.length(column) - DIGEST) == word)
    row = connection.execute(query).mappings().first()
    if row is not None and row["idempotency_key"] != word + digest:
        raise conflict("this Idempotency-Key made another job", "idempotency_conflict")
    return None if row is None else dict(row)


def _defaults(now: float) -> dict[str, object]:
    texts = dict.fromkeys(("description", "notes"), "")
    return {"state": "created", "source": "platform", "created_at": now, "tags": [], "problems": [], "gpu_ids": [], "fields": {}, **texts}


def progress(job: Job, span: Sequence[Reached] | None) -> dict[str, object]:
    """Returns how far a run is, and the seconds that the rest takes at the pace from its first to its newest step; None without a pace.

    span: step and time of the two. A run that continues another begins at the step of its checkpoint, not at 0.
    """
    step, last, left = job["step"], job["max_steps"], None
    if span is not None and isinstance(last, int) and span[1].step > span[0].step:
        (first, began), (newest, now) = span
        left = round(max(now - began, 0.0) / (newest - first) * max(last - newest, 0), 1)
    return {"step": step, "max_steps": last, "epoch": job["epoch"], "eta_s": left}
