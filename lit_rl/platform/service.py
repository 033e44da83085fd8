"""The parts of a server, which its routes share."""

from __future__ import annotations

import fcntl
import os
from typing import Annotated

from fastapi import Depends
from starlette.requests import HTTPConnection

from lit_rl.net.gpus import gpus
from lit_rl.platform.alerts import Alerts
from lit_rl.platform.checkpoints import Checkpoints
from lit_rl.platform.gpu_history import GpuHistory
from lit_rl.platform.gpu_reader import Nvml
from lit_rl.platform.hub import Hub
from lit_rl.platform.logs import Logs
from lit_rl.platform.machine import Monitor
from lit_rl.platform.metrics import MetricStore
from lit_rl.platform.records import Records
from lit_rl.platform.reports import Reports
from lit_rl.platform.samples import Samples
from lit_rl.platform.settings import REPOSITORY, Settings
from lit_rl.platform.store import Store
from lit_rl.platform.supervisor import Supervisor
from lit_rl.platform.tasks import Task, Tasks


class Service:
    """The parts of a server on a data folder. Raises ValueError where another server works there."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        settings.data.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(settings.data / "server.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            raise ValueError(f"another server works in --data {settings.data}: stop it, or choose another folder") from error
        try:
            self.store = Store(settings.data)
        except ValueError:
            os.close(self._lock)
            raise
        self.records = Records(self.store, settings.data.resolve() / "runs")
        self.checkpoints = Checkpoints(self.store, self.records)
        self.tasks = Tasks(REPOSITORY, self.store, self._made)
        self.metrics = MetricStore(self.store)
        self.logs = Logs(self.records)
        self.gpu_history = GpuHistory(self.store)
        self.hub = Hub()
        self.alerts = Alerts(self.store, self.hub)
        self.reports = Reports(self.records, self.metrics, self.checkpoints, self.gpu_history, self.alerts, self.hub)
        self.samples = Samples(self.store, self.records)
        self.monitor = Monitor(settings.reader or Nvml(), settings.data, self.gpu_history, self.alerts, self.hub, self.reports.look)
        ids = settings.gpu_ids if settings.gpu_ids is not None else tuple(gpu.index for gpu in gpus())
        self.supervisor = Supervisor(settings, self.records, self.logs, self.hub, lambda: ids)

    def _made(self, task: Task) -> None:
        """Mark the checkpoint of which a selection made a model."""
        chosen = task.details.get("chosen")
        if task.kind == "select" and isinstance(chosen, list):
            self.checkpoints.choose(str(task.details["job"]), str(chosen[0]["path"]))

    def start(self) -> None:
        """Begin to work: adopt the jobs that an earlier server left."""
        self.supervisor.start()
        self.monitor.start()

    def close(self) -> None:
        """Close the files, so that another server may begin. Jobs go on."""
        self.tasks.close()
        self.supervisor.close()
        self.monitor.close()
        self.hub.close()
        self.store.close()
        os.close(self._lock)


def service_of(connection: HTTPConnection) -> Service:
    """The service that a request is for."""
    service = connection.app.state.service
    assert isinstance(service, Service)
    return service


Here = Annotated[Service, Depends(service_of)]
