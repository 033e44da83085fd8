"""Reports of runs are kept, judged by the rules, and told to whoever listens."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from lit_rl.platform.alerts import Alerts
from lit_rl.platform.checkpoints import Checkpoints
from lit_rl.platform.gpu_history import GpuHistory
from lit_rl.platform.hub import Hub
from lit_rl.platform.metrics import MetricStore, Point
from lit_rl.platform.records import ENDED, STALLED, Job, Records

LEAST_STALL = 60.0
SILENT = 600.0
"""Seconds of silence after which a run that somebody else started is stale."""


class Reports:
    """The way of a report into the store."""

    def __init__(
        self, records: Records, metrics: MetricStore, checkpoints: Checkpoints, history: GpuHistory, alerts: Alerts, hub: Hub
    ) -> None:
        self.records, self._metrics, self._checkpoints, self._history = records, metrics, checkpoints, history
        self.alerts, self.hub = alerts, hub

    def metrics(self, name: str, points: Sequence[Point]) -> None:
        """Take in metrics; the first ones say that a job runs."""
        self._heard(name)
        kept = self._metrics.add(name, points)
        for point in kept:
            self.alerts.judge(name, point.step, point.metrics)
        self.hub.publish("metrics", name, points=[{"step": p.step, "ts": p.ts, "epoch": p.epoch, "metrics": p.metrics} for p in kept])

    def gpus(self, name: str, samples: Sequence[Mapping[str, object]]) -> None:
        """Take in GPU figures."""
        self._heard(name)
        self._history.add(name, samples)
        self.hub.publish("gpu", name, samples=list(samples))

    def checkpoint(self, name: str, *, step: int, path: str, eval_results: Mapping[str, object] | None) -> dict[str, object]:
        """Take in a checkpoint."""
        self._heard(name)
        found = self._checkpoints.add(name, step=step, path=path, eval_results=eval_results)
        self.hub.publish("checkpoint", name, checkpoint=found)
        return found

    def status(self, name: str, status: str, message: str, *, last: int | None = None) -> Job:
        """Take in a state. It holds for a run that somebody else started; of others it is only told. last: the step of the last report."""
        job = self._heard(name)
        if last is not None:
            self.records.change(name, max_steps=last)
        state = status if status in ("running", *ENDED) else None
        if job["source"] == "external" and state is not None:
            ended = time.time() if state in ENDED else None
            self.records.change(name, state=state, reason=message or None, ended_at=ended)
        self.hub.publish("state", name, state=state or job["state"], message=message, status=status)
        return self.records.find(name)

    def look(self) -> None:
        """Note what has fallen silent."""
        self.silence()
        self.stalled()

    def stalled(self) -> None:
        """Open and close alerts of running jobs that take three times as long for a step as they usually do."""
        for job in self.records.in_states(("running",)):
            heard, usual = job["reported_at"], self._metrics.usual_seconds(str(job["uuid"]))
            if isinstance(heard, float) and usual is not None:
                waited = time.time() - heard
                late = waited > max(3 * usual, LEAST_STALL)
                sentence = f"no step for {waited:.0f} s; usually one takes {usual:.1f} s" if late else None
                self.alerts.note(str(job["uuid"]), STALLED, sentence)

    def silence(self) -> None:
        """Note the runs of others that have not reported for long."""
        since = time.time() - SILENT
        for job in self.records.in_states(("running",), source="external"):
            heard = job["reported_at"] or job["started_at"]
            if isinstance(heard, float) and heard < since and self.records.silent(str(job["uuid"]), since):  # it may report meanwhile
                self.hub.publish("state", str(job["uuid"]), state="stale", message="no report for ten minutes")

    def _heard(self, name: str) -> Job:
        """The job that reports; it runs, whatever was thought of it."""
        job = self.records.register(name)
        before = ("starting",) if job["source"] == "platform" else ("stale",)
        if job["state"] in before and self.records.move(name, before, "running", reported_at=time.time()):
            self.hub.publish("state", name, state="running", message="")
        return job
