"""The machine under the jobs: GPUs through NVML, the host through psutil, both within the limits of a container."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from lit_rl.platform.alerts import Alerts
from lit_rl.platform.gpu_history import MEASURED, GpuHistory
from lit_rl.platform.gpu_reader import Figures, GpuReader
from lit_rl.platform.hub import Hub

log = logging.getLogger(__name__)
PERIOD = 2.0
LITTLE_DISK = 0.05


def host(folder: Path, cgroup: Path = Path("/sys/fs/cgroup")) -> Figures:
    """CPU, memory and disk as {used, total, percent}, bytes; memory and CPUs within the limits of a container."""
    memory, disk = psutil.virtual_memory(), psutil.disk_usage(str(folder))
    total, used = memory.total, memory.total - memory.available
    limit = limit_of(cgroup / "memory.max")
    if limit is not None and limit < total:
        total, used = int(limit), int((cgroup / "memory.current").read_text())
    return {
        "cpu": {"percent": psutil.cpu_percent(), "count": cpus(cgroup)},
        "mem": {"used": used, "total": total, "percent": round(100 * used / total, 1)},
        "disk": {"used": disk.used, "total": disk.total, "percent": disk.percent},
    }


def cpus(cgroup: Path) -> float:
    """CPUs that this container may use."""
    count, path = float(psutil.cpu_count() or 1), cgroup / "cpu.max"
    quota, _, period = path.read_text().partition(" ") if path.exists() else ("max", "", "")
    return count if quota == "max" else min(count, float(quota) / float(period))


def limit_of(path: Path) -> float | None:
    """The number of a cgroup's file; None for `max` and for no file."""
    text = path.read_text().strip() if path.exists() else "max"
    return None if text == "max" else float(text)


class Monitor:
    """Measures the GPUs every two seconds, keeps and tells what it finds, and looks after the disk and, by `more`, the reports."""

    def __init__(self, reader: GpuReader, folder: Path, history: GpuHistory, alerts: Alerts, hub: Hub, more: Callable[[], None]) -> None:
        self.reader, self.folder, self.history, self.alerts, self.hub = reader, folder, history, alerts, hub
        self._more, self._thinned = more, -math.inf
        self._end, self._thread = threading.Event(), threading.Thread(target=self._watch, name="monitor", daemon=True)

    def start(self) -> None:
        """Begin to measure."""
        self._thread.start()

    def close(self) -> None:
        """End."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    def shown(self) -> Figures:
        """The machine now."""
        found, reason = self.reader.read(), self.reader.reason
        return {"available": bool(found), "reason": reason or None, "gpus": found, "host": host(self.folder)}

    def look(self) -> None:
        """Measure once."""
        samples = [{**figures, "ts": time.time()} for figures in self.reader.read()]
        whole = [sample for sample in samples if "error" not in sample]
        self.history.add(MEASURED, whole)
        if whole:
            self.hub.publish("gpu", samples=whole)
        lost = [f"GPU {sample['gpu_index']}: {sample['error']}" for sample in samples if "error" in sample]
        self.alerts.note("", "gpu_lost", "; ".join(lost) or None)
        disk = psutil.disk_usage(str(self.folder))
        full = disk.free < LITTLE_DISK * disk.total
        self.alerts.note("", "disk", f"{disk.free / 1e9:.1f} GB are left on the disk of {self.folder}" if full else None)
        if time.monotonic() - self._thinned > 3600:
            self._thinned = time.monotonic()
            self.history.thin()

    def _watch(self) -> None:
        while not self._end.wait(PERIOD):
            try:
                self.look()
                self._more()
            except Exception:  # the next look may succeed, e.g. once a disk has room again
                log.exception("looking at the machine failed")
