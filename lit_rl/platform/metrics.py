"""Metrics of jobs: one number for each job, name and step, kept and read back as rows or as curves."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert

from lit_rl.platform.answers import invalid
from lit_rl.platform.curves import Curves
from lit_rl.platform.schema import jobs, metric_keys, points, steps
from lit_rl.platform.store import Store

MAX_KEYS = 512
"""Different metrics of a job."""

MAX_ROWS, MAX_CELLS = 100_000, 2_000_000
"""Rows, and numbers of all rows, of one answer."""

FEWEST_ROWS = 500
"""Rows that are read at once where an answer wants fewer."""

ALIASES = {
    "policy_loss": ("actor/pg_loss", "loss"),
    "value_loss": ("critic/vf_loss",),
    "reward_mean": ("critic/rewards/mean", "reward", "reward_avg"),
    "kl_divergence": ("actor/ppo_kl", "approx_kl", "kl"),
    "entropy": ("actor/entropy",),
    "clip_fraction": ("actor/pg_clipfrac", "clipfrac", "clip_ratio"),
}
"""Names that other trainers give to the canonical metrics; their values are copied, and kept under their own name too."""

HELD_OUT = ("val/", "val_", "eval/", "test/")
"""Beginnings of metrics that are not of training."""

Metrics = Mapping[str, float | None]
Row = dict[str, object]


class Point(NamedTuple):
    """The metrics of a step; None is a number that is not finite. ts: when, in seconds since 1970."""

    step: int
    metrics: Metrics
    epoch: int | None
    ts: float


class MetricStore:
    """The metrics of a store's jobs."""

    def __init__(self, store: Store) -> None:
        self.store, self.curves = store, Curves()

    def add(self, job: str, given: Sequence[Point]) -> list[Point]:
        """Keep points; a number of the same name and step is replaced. Returns them with the canonical names. Raises ApiError 422."""
        named = [point._replace(metrics=with_canonical(point.metrics)) for point in given]
        with self.store.write() as connection:
            ids = self._ids(connection, job, {key for point in named for key in point.metrics})
            rows: list[dict[str, object]] = [
                {"key": ids[key], "step": p.step, "value": value} for p in named for key, value in p.metrics.items()
            ]
            _upsert(connection, points, rows, ("key", "step"))
            _upsert(connection, steps, [{"job": job, "step": p.step, "ts": p.ts, "epoch": p.epoch} for p in named], ("job", "step"))
            newest = max(named, key=lambda point: point.step)
            connection.execute(sa.update(jobs).where(jobs.c.uuid == job).values(reported_at=time.time()))
            ahead = sa.update(jobs).where(jobs.c.uuid == job, sa.func.coalesce(jobs.c.step, -1) < newest.step)
            connection.execute(ahead.values(step=newest.step, epoch=sa.func.coalesce(newest.epoch, jobs.c.epoch)))
        self.curves.reported(job)
        return named

    def usual_seconds(self, job: str) -> float | None:
        """The median time between the newest 20 steps of a job."""
        query = sa.select(steps.c.ts).where(steps.c.job == job).order_by(steps.c.step.desc()).limit(20)
        with self.store.read() as connection:
            times = list(connection.execute(query).scalars())
        return statistics.median(a - b for a, b in pairwise(times)) if len(times) > 2 else None

    def names(self, job: str) -> dict[str, int]:
        """The metrics of a job, and their ids."""
        with self.store.read() as connection:
            return _known(connection, job)

    def rows(
        self, job: str, *, split: str = "train", since: int = -1, limit: int = MAX_ROWS, keys: Sequence[str] = ()
    ) -> list[dict[str, object]]:
        """One row for each step, ascending: step, ts, epoch, and its metrics; the newest `limit`, or from `since` on the oldest.

        split: train: rows that have the policy's loss and the mean reward as numbers, as far as the job reports them; eval: rows with
        held-out metrics; all: every row.
        """
        known = self.names(job)
        ids = {number: name for name, number in known.items() if not keys or name in keys}
        wanted = [name for name in ("policy_loss", "reward_mean") if name in known and (not keys or name in keys)]
        query = sa.select(steps.c.step, steps.c.ts, steps.c.epoch).where(steps.c.job == job, steps.c.step > since)
        query = query.order_by(steps.c.step.desc() if since < 0 else steps.c.step)
        chosen, seen, left = list[dict[str, object]](), 0, _most_rows(len(ids)) + 1
        with self.store.read() as connection:
            while left > 0 and len(chosen) < limit:
                some = min(left, max(limit - len(chosen), FEWEST_ROWS))
                found = _whole(connection, ids, query.offset(seen).limit(some))
                chosen += [row for row in found if _in_split(row, split, wanted)][: limit - len(chosen)]
                seen, left = seen + some, left - some if len(found) == some else 0
        return sorted(chosen, key=lambda row: int(str(row["step"])))

    def most_rows(self, job: str, keys: Sequence[str] = ()) -> int:
        """Rows that one answer has at most, so that its numbers are at most `MAX_CELLS`."""
        return _most_rows(sum(not keys or name in keys for name in self.names(job)))

    def series(self, job: str, keys: Sequence[str], *, buckets: int, first: int | None, last: int | None) -> dict[str, dict[str, object]]:
        """Curves by name, as `Curves.of` says."""
        known = self.names(job)
        wanted = [key for key in dict.fromkeys(keys or known) if key in known]
        buckets = min(buckets, MAX_CELLS // max(4 * len(wanted), 1))
        with self.store.read() as connection:
            ids = [known[key] for key in wanted]
            return dict(zip(wanted, self.curves.of(connection, job, ids, buckets=buckets, first=first, last=last), strict=True))

    def _ids(self, connection: sa.Connection, job: str, names: set[str]) -> dict[str, int]:
        known = _known(connection, job)
        new = sorted(names - known.keys())
        if len(known) + len(new) > MAX_KEYS:
            raise invalid(
                f"a job has at most {MAX_KEYS} metrics; {new[-1][:80]!r} would be one more", [{"field": "metrics", "problem": "too many"}]
            )
        if new:
            connection.execute(sa.insert(metric_keys), [{"job": job, "name": name} for name in new])
            known = _known(connection, job)
        return known


def _whole(connection: sa.Connection, ids: Mapping[int, str], query: sa.Select[tuple[int, float, int | None]]) -> list[dict[str, object]]:
    """The rows of some steps, in their order, with the metrics of these ids."""
    found: dict[int, dict[str, object]] = {}
    for step, ts, epoch in connection.execute(query):
        found[step] = {"step": step, "ts": ts, "epoch": epoch}
    span = (min(found, default=0), max(found, default=-1))
    for part in (list(ids)[i : i + 256] for i in range(0, len(ids), 256)):
        values = sa.select(points.c.key, points.c.step, points.c.value).where(points.c.key.in_(part), points.c.step.between(*span))
        for key, step, value in connection.execute(values):
            if step in found:
                found[step][ids[key]] = value
    return list(found.values())


def _most_rows(keys: int) -> int:
    return min(MAX_ROWS, MAX_CELLS // max(keys, 1))


def with_canonical(metrics: Metrics) -> dict[str, float | None]:
    """The metrics, and under their canonical names copies of those that have another one."""
    copied = {
        name: metrics[other] for name, others in ALIASES.items() if name not in metrics for other in reversed(others) if other in metrics
    }
    return {key: None if value is None or not math.isfinite(value) else float(value) for key, value in {**metrics, **copied}.items()}


def _known(connection: sa.Connection, job: str) -> dict[str, int]:
    query = sa.select(metric_keys.c.name, metric_keys.c.id).where(metric_keys.c.job == job).order_by(metric_keys.c.id)
    return {row.name: row.id for row in connection.execute(query)}


def _upsert(connection: sa.Connection, table: sa.Table, rows: list[dict[str, object]], keys: tuple[str, ...]) -> None:
    query = insert(table)
    new = {column.name: query.excluded[column.name] for column in table.c if column.name not in keys}
    if rows:
        connection.execute(query.on_conflict_do_update(index_elements=list(keys), set_=new), rows)


def _in_split(row: Mapping[str, object], split: str, wanted: Sequence[str]) -> bool:
    held_out = [key for key in row if key.startswith(HELD_OUT)]
    if split == "all":
        return True
    if split == "eval":
        return bool(held_out)
    if wanted:
        return all(row.get(name) is not None for name in wanted)
    return len(row) - 3 > len(held_out)
