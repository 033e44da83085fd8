"""Starts, watches and stops the processes of jobs. It keeps nothing in memory that a new server could not read again."""

from __future__ import annotations

import logging
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from lit_rl.platform import processes
from lit_rl.platform.answers import conflict, invalid
from lit_rl.platform.environment import environment_of
from lit_rl.platform.failures import explained, last_text
from lit_rl.platform.hub import Hub
from lit_rl.platform.logs import Logs
from lit_rl.platform.plan import Plan, check_keys, planned
from lit_rl.platform.records import ENDED, Job, Records
from lit_rl.platform.settings import Settings
from lit_rl.platform.trial import check_values

log = logging.getLogger(__name__)
PERIOD = 0.5
GRACE = 300.0
"""Seconds between the wish that a job stops and its end by force: an iteration with its rollout takes minutes."""

ALIVE = ("starting", "running", "stopping")


class Supervisor:
    """The jobs' processes. One thread looks at all of them twice a second, and starts those that wait for GPUs that are free."""

    def __init__(self, settings: Settings, records: Records, logs: Logs, hub: Hub, gpus: Callable[[], Sequence[int]]) -> None:
        self.settings, self.records, self.logs, self.hub, self.gpus = settings, records, logs, hub, gpus
        self._shims: dict[str, subprocess.Popen[bytes]] = {}
        self._ends: dict[str, float] = {}  # when a job is ended by force, by a clock that nobody sets
        self._odd: set[object] = set()
        self._looking, self._asking = threading.Lock(), threading.Lock()
        self._end, self._thread = threading.Event(), threading.Thread(target=self._watch, name="supervisor", daemon=True)

    def start(self) -> None:
        """Adopt the jobs that an earlier server left, then watch."""
        self.look()
        self._thread.start()

    def close(self) -> None:
        """Leave the jobs to themselves."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    # ------------------------------------------------------------------ what is asked
    def plan(self, job: Job) -> Plan:
        """The run of a job on this machine as it is now."""
        fields, checkpoint = job["fields"], job["checkpoint"]
        assert isinstance(fields, dict)
        folder = self.records.folder(str(job["uuid"]))
        return planned(
            fields, folder, root=self.settings.run_root, gpus=len(self.gpus()), checkpoint=None if checkpoint is None else str(checkpoint)
        )

    def argv(self, job: Job, plan: Plan) -> list[str]:
        """The command of a job."""
        checkpoint = job["checkpoint"]
        folder = self.records.folder(str(job["uuid"]))
        return plan.argv(folder, self.settings.run_root, None if checkpoint is None else str(checkpoint))

    def enqueue(self, name: str) -> Job:
        """Let a job wait for its GPUs. Raises ApiError 409 in another state, 422 where it could not start."""
        with self._asking:  # one after the other: the second must not write `job.yaml` while the run of the first reads it
            return self._enqueue(name)

    def _enqueue(self, name: str) -> Job:
        job = self.records.own(name)
        if job["state"] != "created":
            raise conflict(f"the job is {job['state']}; only a created one starts, a stopped one is resumed or cloned", "wrong_state")
        plan = self.plan(job)
        if plan.template is not None:
            folder = self.records.folder(name)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / processes.OVERLAY).write_text(plan.yaml, encoding="utf-8")
            self._check(job, plan, folder)
        self.records.change(name, problems=plan.problems)
        if plan.problems:
            raise invalid(f"the job cannot start: {plan.problems[0]['problem']}", plan.problems)
        if self.records.move(name, ("created",), "queued", queued_at=time.time()):
            self._tell(name, "queued")
        return self.records.find(name)

    def _check(self, job: Job, plan: Plan, folder: Path) -> None:
        """Read the job's files as its command would: first their keys, then, where somebody set keys of his own, their values."""
        check_keys(plan, folder, self.settings.run_root)
        fields = job["fields"]
        if isinstance(fields, dict) and fields["overrides"] and not plan.problems:
            environment = environment_of(self.settings, str(job["uuid"]), folder, gpus=[])
            check_values(plan, folder, self.settings.run_root, environment)

    def stop(self, name: str, *, now: bool, grace: float = GRACE) -> Job:
        """Ask a job to stop with a checkpoint, or end it at once. Asked again, the answer is the same."""
        job, moment = self.records.own(name), time.time()
        if job["state"] in ENDED:
            if job["stop_requested_at"] is None:
                raise conflict(f"the job is {job['state']}", "wrong_state")
            return job
        if self.records.move(name, ("created", "queued"), "stopped", stop_requested_at=moment, ended_at=moment):
            self._tell(name, "stopped")
        elif self.records.move(name, ("starting", "running"), "stopping", stop_requested_at=moment, kill_at=moment + grace):
            self._ends[name] = time.monotonic() + grace
            self._tell(name, "stopping")
            processes.ask_to_stop(self.records.folder(name))
        if now:
            self.records.move(name, ("stopping",), "stopping", stop_requested_at=moment, kill_at=moment)
            self._ends[name] = time.monotonic()
            processes.kill(self.records.folder(name))
        return self.records.find(name)

    # ------------------------------------------------------------------ what happens
    def _watch(self) -> None:
        while not self._end.wait(PERIOD):
            try:
                self.look()
            except Exception:  # the next look may succeed, e.g. once a disk has room again
                log.exception("looking at the jobs failed")

    def look(self) -> None:
        """Note the jobs that have ended, end those whose time to stop is over, start those whose turn it is."""
        with self._looking:
            for job in self.records.in_states(ALIVE):
                try:
                    self._look_at(job)
                except (OSError, ValueError, AssertionError, KeyError, TypeError):  # files that somebody changed: the others go on
                    if job["uuid"] not in self._odd:
                        log.exception("looking at job %s failed; it is said once", job["uuid"])
                    self._odd.add(job["uuid"])
            self._schedule()

    def _late(self, job: Job) -> bool:
        """True once the time is over in which a job may stop by itself; a clock that is set meanwhile changes nothing."""
        name, wanted, asked = str(job["uuid"]), job["kill_at"], job["stop_requested_at"]
        if not isinstance(wanted, float) or not isinstance(asked, float):
            return False
        left = min(max(wanted - time.time(), 0.0), max(wanted - asked, 0.0))
        return time.monotonic() >= self._ends.setdefault(name, time.monotonic() + left)

    def _look_at(self, job: Job) -> None:
        name, folder = str(job["uuid"]), self.records.folder(str(job["uuid"]))
        end = processes.ending(folder)
        shim = self._shims.get(name)
        if end is None and (processes.alive(folder) or (shim is not None and shim.poll() is None)):
            self.logs.follow(name, self.hub)
            if self._late(job):
                processes.kill(folder)
            elif job["state"] == "stopping":
                self._ask_again(folder)
            return
        if end is None and shim is None and not processes.begun(folder) and job["state"] == "starting":
            self._launch(job)  # the server ended between its decision and the start
            return
        self._ended(job, processes.ending(folder))

    def _ask_again(self, folder: Path) -> None:
        """A server that ended right after it noted the wish has not told the job."""
        told = folder / "asked"
        if folder.is_dir() and not told.exists() and processes.child_pid(folder) is not None:
            told.touch()
            processes.ask_to_stop(folder)

    def _ended(self, job: Job, end: processes.Ending | None) -> None:
        name, folder = str(job["uuid"]), self.records.folder(str(job["uuid"]))
        asked, shim = job["stop_requested_at"] is not None, self._shims.pop(name, None)
        had_time = job["kill_at"] != job["stop_requested_at"]  # who wants the end at once gets what he asked for
        killed = end is not None and end.signal == "SIGKILL" and self._late(job) and had_time
        if end is None and shim is not None and not processes.begun(folder) and job["state"] == "starting":
            end = processes.Ending(error=last_text(folder / "shim.log").strip()[-300:] or f"its folder {folder} is gone")
        self._ends.pop(name, None)
        state, reason = processes.verdict(end, asked=asked, done=(folder / processes.DONE).exists(), killed=killed)
        if end is None and state == "failed" and processes.rebooted(folder):
            reason = "host_rebooted: the machine started again; resume the job from its last checkpoint"
        elif end is None and state == "failed" and not processes.begun(folder):
            reason = f"lost: the files of the run were removed from its folder {folder} while it ran"
        if state == "failed":
            reason = explained(reason, folder / "stdout.log")
        values: dict[str, object] = {"reason": reason, "ended_at": time.time(), "gpu_ids": []}
        if end is not None:
            values |= {"returncode": end.code, "signal": end.signal}
        if self.records.move(name, ALIVE, state, **values):
            self._tell(name, state, reason or "")

    def _schedule(self) -> None:
        """Start waiting jobs in the order in which they came; one that waits for GPUs lets none pass that wants some, too."""
        taken = {gpu for job in self.records.in_states(ALIVE) for gpu in _ids(job)}
        on_cpu = sum(not _ids(job) for job in self.records.in_states(ALIVE))
        free, waits = [gpu for gpu in self.gpus() if gpu not in taken], False
        for job in self.records.in_states(("queued",)):
            wanted = self._gpus_of(job)
            if wanted and not waits and wanted <= len(free):
                ids, free = free[:wanted], free[wanted:]
                self._begin(job, ids)
            elif not wanted and on_cpu < self.settings.cpu_jobs:
                on_cpu += 1
                self._begin(job, [])
            waits = waits or wanted > len(free)

    def _gpus_of(self, job: Job) -> int:
        fields = job["fields"]
        wanted = fields.get("num_gpus") if isinstance(fields, dict) else None
        return wanted if isinstance(wanted, int) else min(len(self.gpus()), 1)

    def _begin(self, job: Job, ids: list[int]) -> None:
        name = str(job["uuid"])
        if self.records.move(name, ("queued",), "starting", gpu_ids=ids, started_at=time.time()):
            self._tell(name, "starting")
            self._launch(self.records.find(name))

    def _launch(self, job: Job) -> None:
        name, folder = str(job["uuid"]), self.records.folder(str(job["uuid"]))
        argv = self.argv(job, self.plan(job))
        environment = environment_of(self.settings, name, folder, gpus=_ids(job))
        try:
            self._shims[name] = processes.launch(folder, argv, cwd=self.settings.run_root, environment=environment)
        except OSError as error:  # a full disk, no memory for a process, a folder that is gone
            self._ended(job, processes.Ending(error=str(error)))

    def _tell(self, name: str, state: str, message: str = "") -> None:
        self.hub.publish("state", name, state=state, message=message)


def _ids(job: Job) -> list[int]:
    ids = job["gpu_ids"]
    assert isinstance(ids, list)
    return ids
