"""Curves of metrics for charts: at most so many points, whatever the length of the run, and remembered until its job reports again."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Sequence

import sqlalchemy as sa

from lit_rl.platform.schema import points

REMEMBERED = 400_000
"""Numbers of the curves that are remembered: about 15 MB."""

Curve = dict[str, object]
Asked = tuple[str, int, int, int | None, int | None]
"""Job, metric, buckets, first and last step."""


class Curves:
    """The last curves that somebody asked for. One of 50,000 points takes tens of milliseconds, and a page asks for all of a job."""

    def __init__(self) -> None:
        self._reports = Counter[str]()
        self._found = OrderedDict[Asked, tuple[int, Curve]]()
        self._numbers, self._lock = 0, threading.Lock()

    def reported(self, job: str) -> None:
        """Forget the curves of a job: it has reported, and what it reported is in the database."""
        with self._lock:
            self._reports[job] += 1

    def of(
        self, connection: sa.Connection, job: str, keys: Sequence[int], *, buckets: int, first: int | None, last: int | None
    ) -> list[Curve]:
        """The curve of each metric: of each bucket of steps its first step, and the least, largest and mean value.

        raw: each bucket has one point.
        """
        return [self._of(connection, (job, key, buckets, first, last)) for key in keys]

    def _of(self, connection: sa.Connection, asked: Asked) -> Curve:
        with self._lock:
            reports = self._reports[asked[0]]
            known, curve = self._found.get(asked, (-1, {}))
            if known == reports:
                self._found.move_to_end(asked)
                return curve
        curve = made(connection, *asked[1:])
        with self._lock:
            self._numbers -= _size(self._found.pop(asked, (0, {}))[1])
            self._found[asked] = reports, curve  # of before the report that came meanwhile, if one came
            self._numbers += _size(curve)
            while self._numbers > REMEMBERED:
                self._numbers -= _size(self._found.popitem(last=False)[1][1])
        return curve


def _size(curve: Curve) -> int:
    return sum(len(values) for values in curve.values() if isinstance(values, list))


def made(connection: sa.Connection, key: int, buckets: int, first: int | None, last: int | None) -> Curve:
    """The curve of a metric, read from the database."""
    mine = [points.c.key == key]
    mine += [] if first is None else [points.c.step >= first]
    mine += [] if last is None else [points.c.step <= last]
    low, high, count = connection.execute(
        sa.select(sa.func.min(points.c.step), sa.func.max(points.c.step), sa.func.count()).where(*mine)
    ).one()
    raw = count <= buckets
    width = 1 if raw else max(1, -(-(high - low + 1) // buckets))
    bucket = sa.literal(0) + (points.c.step - (low or 0)) // width
    figures = [sa.func.min(points.c.step), sa.func.min(points.c.value), sa.func.max(points.c.value), sa.func.avg(points.c.value)]
    rows = connection.execute(sa.select(*figures).where(*mine).group_by(bucket).order_by(sa.func.min(points.c.step))).all()
    step, least, largest, mean = zip(*rows) if rows else ((), (), (), ())
    return {"step": list(step), "min": list(least), "max": list(largest), "mean": list(mean), "raw": raw}
