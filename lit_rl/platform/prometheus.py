"""Numbers of jobs for Prometheus, read from the database when it asks: a job that ended some minutes ago has no series any more."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping

import sqlalchemy as sa
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lit_rl.platform.records import ACTIVE, CANONICAL
from lit_rl.platform.schema import gpu_samples, jobs, metric_keys, points
from lit_rl.platform.store import Store

KEPT_SECONDS = 300.0
"""The time for which the series of a job that has ended stay."""

MOST_JOBS = 100
GPUS = {
    "utilization": ("rl_gpu_utilization_percent", "Share of time in which the GPU computed"),
    "memory_used": ("rl_gpu_memory_used_gigabytes", "Memory in use"),
    "memory_total": ("rl_gpu_memory_total_gigabytes", "Memory there is"),
    "temperature": ("rl_gpu_temperature_celsius", "Temperature"),
    "power_w": ("rl_gpu_power_watts", "Power drawn"),
}
NUMBERS: tuple[tuple[re.Pattern[str], str, str], ...] = (
    (re.compile(rf"({'|'.join(CANONICAL)})"), "rl_metric", "metric"),
    (re.compile(r"reward/([^/]+)(?:/mean)?"), "rl_reward_mean", "source"),
    (re.compile(r"reward/([^/]+)/std"), "rl_reward_std", "source"),
    (re.compile(r"reward/([^/]+)/failed_frac"), "rl_reward_failed_fraction", "source"),
    (re.compile(r"time/(\w+)_s"), "rl_step_seconds", "phase"),
    (re.compile(r"(?:group/)?zero_std_ratio()"), "rl_group_zero_std_ratio", ""),
    (re.compile(r"nan_ratio()"), "rl_unscored_fraction", ""),
)
"""The pattern of a job's metric, the name here, and the label that the pattern's part becomes."""

HELP = {
    "rl_metric": "Newest value of the canonical metrics, to which other trainers' names lead too",
    "rl_reward_mean": "Newest mean of a reward", "rl_reward_std": "Newest deviation of a reward",
    "rl_reward_failed_fraction": "Newest share that a reward could not score", "rl_step_seconds": "Seconds of the newest iteration",
    "rl_group_zero_std_ratio": "Newest share of groups that earn the same", "rl_unscored_fraction": "Newest share without a reward",
}  # fmt: skip


class JobCollector(Collector):
    """Gauges of the newest `MOST_JOBS` jobs that are active, or ended at most `KEPT_SECONDS` ago, and of the machine's GPUs."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def collect(self) -> Iterator[Metric]:
        """One reading of the database."""
        with self.store.read() as connection:
            counts = GaugeMetricFamily("rl_jobs", "Jobs by state", labels=["state"])
            for state, count in connection.execute(sa.select(jobs.c.state, sa.func.count()).group_by(jobs.c.state)):
                counts.add_metric([state], count)
            yield counts
            shown = _shown(connection)
            yield from _about_jobs(shown)
            yield from _numbers(connection, [str(job["uuid"]) for job in shown])
            yield from _gpus(connection)


def text(store: Store) -> bytes:
    """All series in Prometheus' text format, from a registry of their own."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(JobCollector(store))
    return generate_latest(registry)


def _shown(connection: sa.Connection) -> list[Mapping[str, object]]:
    lives = sa.or_(jobs.c.state.in_((*ACTIVE, "stale")), jobs.c.ended_at > time.time() - KEPT_SECONDS)
    query = sa.select(jobs).where(lives).order_by(jobs.c.seq.desc()).limit(MOST_JOBS)
    return [dict(row) for row in connection.execute(query).mappings()]


def _about_jobs(shown: list[Mapping[str, object]]) -> Iterator[Metric]:
    state = GaugeMetricFamily("rl_job_state", "1 for the state that a job is in", labels=["job_id", "name", "state"])
    step = GaugeMetricFamily("rl_train_step", "Optimizer steps of a job", labels=["job_id"])
    for job in shown:
        state.add_metric([str(job["uuid"]), str(job["name"]), str(job["state"])], 1)
        if isinstance(job["step"], int):
            step.add_metric([str(job["uuid"])], job["step"])
    yield state
    yield step


def _numbers(connection: sa.Connection, names: list[str]) -> Iterator[Metric]:
    """The newest finite value of every metric that `NUMBERS` names."""
    families = {name: GaugeMetricFamily(name, HELP[name], labels=["job_id", *([label] if label else [])]) for _, name, label in NUMBERS}
    newest = sa.select(points.c.value).where(points.c.key == metric_keys.c.id, points.c.value.is_not(None))
    value = newest.order_by(points.c.step.desc()).limit(1).correlate(metric_keys).scalar_subquery().label("value")
    query = sa.select(metric_keys.c.job, metric_keys.c.name, value).where(metric_keys.c.job.in_(names))
    for row in connection.execute(query):
        for pattern, name, label in NUMBERS if row.value is not None else ():
            if match := pattern.fullmatch(row.name):
                families[name].add_metric([row.job, *([match[1]] if label else [])], row.value)
                break
    yield from families.values()


def _gpus(connection: sa.Connection) -> Iterator[Metric]:
    """The newest sample of each GPU that the service itself has measured within a minute."""
    recent = sa.select(gpu_samples).where(gpu_samples.c.job == "", gpu_samples.c.ts > time.time() - 60).order_by(gpu_samples.c.ts)
    found = {row["gpu_index"]: row for row in connection.execute(recent).mappings()}
    for column, (name, words) in GPUS.items():
        family = GaugeMetricFamily(name, words, labels=["gpu"])
        for gpu, row in sorted(found.items()):
            if row[column] is not None:
                family.add_metric([str(gpu)], row[column])
        yield family
