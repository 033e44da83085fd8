"""Alerts by rule, without any setup: one is open for a job and a rule until the reason is gone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import sqlalchemy as sa

from lit_rl.platform.answers import text_of
from lit_rl.platform.hub import Hub
from lit_rl.platform.metrics import Metrics
from lit_rl.platform.records import ENDED
from lit_rl.platform.schema import alerts, jobs
from lit_rl.platform.store import Store


class Rule(NamedTuple):
    """A bound on metrics. applies: by the metric's name. broken: by its value. says: the sentence, of name and value."""

    name: str
    applies: Callable[[str], bool]
    broken: Callable[[float], bool]
    says: str


RULES = (
    Rule("kl", lambda key: key == "kl_divergence", lambda value: value > 0.1, "{key} is {value:.3g}, above 0.1: far from the reference"),
    Rule(
        "zero_std", lambda key: key.endswith("zero_std_ratio"), lambda value: value > 0.8,
        "{value:.0%} of the groups have equal rewards and teach nothing",
    ),
    Rule(
        "failed_rewards", lambda key: key.endswith(("failed_frac", "failed_fraction")), lambda value: value > 0.01,
        "{key}: {value:.1%} of the samples could not be scored",
    ),
    Rule(
        "disagreement", lambda key: "/disagrees_with/" in key, lambda value: value > 0.6,
        "{key}: {value:.0%} of the pairs that both rewards order are ordered in opposite ways",
    ),
)  # fmt: skip


class Alerts:
    """The alerts of a store's jobs. Those of no job have the empty name."""

    def __init__(self, store: Store, hub: Hub) -> None:
        self.store, self.hub = store, hub
        with store.read() as connection:
            rows = connection.execute(sa.select(alerts.c.job, alerts.c.rule).where(alerts.c.ended_at.is_(None))).all()
        self._noting = threading.Lock()
        self._open = {(row.job, row.rule) for row in rows}  # most reports change nothing, and ask the database for nothing

    def judge(self, job: str, step: int, metrics: Metrics) -> None:
        """Open and close alerts by the metrics of a step."""
        found = found_by_rules(metrics)
        for rule, sentence in found.items():
            self.note(job, rule, sentence, step)

    def note(self, job: str, rule: str, sentence: str | None, step: int | None = None) -> None:
        """Open an alert, or with None as sentence close it; nothing changes where it is so already."""
        if ((job, rule) in self._open) == (sentence is not None):
            return
        with self._noting:  # of two reports at the same time, one opens the alert
            if ((job, rule) in self._open) == (sentence is not None):
                return
            self._write(job, rule, sentence, step)
            self._open ^= {(job, rule)}
        self.hub.publish("alert", job or None, rule=rule, message=sentence or "", open=sentence is not None, step=step)

    def forget(self, job: str) -> None:
        """Forget what is open of a job that is removed; one of the same id begins without alerts."""
        with self._noting:
            self._open = {(name, rule) for name, rule in self._open if name != job}

    def _write(self, job: str, rule: str, sentence: str | None, step: int | None) -> None:
        mine = sa.and_(alerts.c.job == job, alerts.c.rule == rule, alerts.c.ended_at.is_(None))
        with self.store.write() as connection:
            if sentence is None:
                connection.execute(sa.update(alerts).where(mine).values(ended_at=time.time()))
            else:
                connection.execute(sa.insert(alerts).values(job=job, rule=rule, message=sentence, step=step, ts=time.time()))

    def listed(self, job: str) -> list[dict[str, object]]:
        """Alerts of a job, the oldest first."""
        with self.store.read() as connection:
            rows = connection.execute(sa.select(alerts).where(alerts.c.job == job).order_by(alerts.c.id)).mappings().all()
        return [_shown(row) for row in rows]

    def of_all(self, *, open_only: bool, limit: int) -> list[dict[str, object]]:
        """Alerts of all jobs and of the machine, whose `job` is None, the newest first. open_only: Those of jobs that are not over."""
        query = sa.select(alerts, jobs.c.name).outerjoin(jobs, jobs.c.uuid == alerts.c.job).order_by(alerts.c.id.desc()).limit(limit)
        now = sa.and_(alerts.c.ended_at.is_(None), sa.func.coalesce(jobs.c.state, "").not_in(ENDED))
        with self.store.read() as connection:
            rows = connection.execute(query.where(now) if open_only else query).mappings().all()
        return [_shown(row) | {"job": row["job"] or None, "name": row["name"]} for row in rows]


def _shown(row: sa.RowMapping) -> dict[str, object]:
    kept = ("id", "rule", "message", "step", "ts")
    return {key: row[key] for key in kept} | {"created_at": text_of(row["ts"]), "ended_at": text_of(row["ended_at"])}


def found_by_rules(metrics: Metrics) -> dict[str, str | None]:
    """Returns the sentence of each rule that these metrics concern; None where all is well."""
    broken = sorted(key for key, value in metrics.items() if value is None)
    found: dict[str, str | None] = {"nan": f"{', '.join(broken[:5])}: not a finite number" if broken else None}
    for rule in RULES:
        mine: Mapping[str, float] = {key: value for key, value in metrics.items() if value is not None and rule.applies(key)}
        if mine:
            key, value = next(((k, v) for k, v in mine.items() if rule.broken(v)), ("", 0.0))
            found[rule.name] = rule.says.format(key=key, value=value) if key else None
    return found
