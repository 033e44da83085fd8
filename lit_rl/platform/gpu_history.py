"""Figures of GPUs over time: raw for a day, then one for each minute."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert

from lit_rl.platform.schema import gpu_samples
from lit_rl.platform.store import Store

MEASURED = ""
"""The name that stands in the place of a job for figures that the service measured itself."""

RAW_SECONDS, KEPT_SECONDS = 86_400.0, 14 * 86_400.0
FIGURES = ("utilization", "memory_used", "memory_total", "temperature", "power_w")


class GpuHistory:
    """The figures of a store."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def add(self, job: str, samples: Sequence[Mapping[str, object]]) -> None:
        """Keep figures; those of the same GPU and moment are replaced."""
        rows = [{key: sample.get(key) for key in ("gpu_index", "ts", *FIGURES)} | {"job": job} for sample in samples]
        query = insert(gpu_samples).prefix_with("OR REPLACE")
        if rows:
            with self.store.write() as connection:
                connection.execute(query, rows)

    def of(self, job: str, ids: Sequence[int], *, since: float) -> list[dict[str, object]]:
        """The figures that a job reported, and those measured of its GPUs, in order of time."""
        measured = sa.and_(gpu_samples.c.job == MEASURED, gpu_samples.c.gpu_index.in_(ids))
        query = sa.select(gpu_samples).where(sa.or_(gpu_samples.c.job == job, measured), gpu_samples.c.ts >= since)
        with self.store.read() as connection:
            rows = connection.execute(query.order_by(gpu_samples.c.ts).limit(100_000)).mappings().all()
        return [{key: row[key] for key in ("gpu_index", "ts", *FIGURES)} for row in rows]

    def thin(self, now: float | None = None) -> None:
        """Put the mean of each minute in the place of figures that are older than a day, and forget those of two weeks ago."""
        now = time.time() if now is None else now
        old, minute = gpu_samples.c.ts < now - RAW_SECONDS, sa.func.floor(gpu_samples.c.ts / 60.0) * 60.0
        key = (gpu_samples.c.job, gpu_samples.c.gpu_index, minute)
        means = [sa.func.avg(gpu_samples.c[name]) for name in FIGURES]
        with self.store.write() as connection:
            rows = connection.execute(sa.select(*key, *means).where(old).group_by(*key)).all()
            connection.execute(sa.delete(gpu_samples).where(old))
            names = ("job", "gpu_index", "ts", *FIGURES)
            kept = [dict(zip(names, row)) for row in rows if row[2] > now - KEPT_SECONDS]
            if kept:
                connection.execute(sa.insert(gpu_samples), kept)
