"""Tells from the files in a job's folder whether its process lives or how it ended; it starts and ends that process."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from lit_rl.platform import shim
from lit_rl.platform.shim import boot_id, identity, start_ticks

STOPPED = 143
DONE = ".done.json"
"""The file that the command line writes when `fit` has returned; without it an exit code of 0 means nothing."""


OVERLAY = "job.yaml"
"""The file in a job's folder that is laid over its template; a word of the command, by which its processes are known."""


@dataclass(frozen=True)
class Ending:
    """Describes how a job's process ended. code, signal: None where nobody was there to see it."""

    code: int | None = None
    signal: str | None = None
    error: str | None = None


def launch(folder: Path, argv: Sequence[str], *, cwd: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a job under a shim. Started twice in one folder, the second shim does nothing."""
    command = [sys.executable, "-P", shim.__file__, str(folder), "--", *argv]
    with (folder / "shim.log").open("ab") as log:
        return subprocess.Popen(
            command, cwd=cwd, env=dict(environment), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )


def alive(folder: Path) -> bool:
    """True while the shim or the job holds the folder's lock, or, in a folder that somebody removed, while one of them lives."""
    try:
        lock = os.open(folder / "run.lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return bool(_seen(folder))
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def begun(folder: Path) -> bool:
    """True once a shim has taken the folder."""
    return (folder / "runner.json").exists()


def ending(folder: Path) -> Ending | None:
    """Returns how the job ended, as its shim has written it; None while it has not."""
    found = _read(folder / "exit.json")
    return None if found is None else Ending(found.get("returncode"), found.get("signal"), found.get("error"))


def rebooted(folder: Path) -> bool:
    """True where the machine has started again since the job did."""
    parent = (_read(folder / "runner.json") or {}).get("shim") or {}
    return parent.get("boot_id") not in (None, boot_id())


def child_pid(folder: Path) -> int | None:
    """The number of the job's process, if that process still lives."""
    return _living(_runner(folder).get("child"))


def ask_to_stop(folder: Path) -> None:
    """SIGTERM to the shim, which hands it on; to the job itself where the shim is gone. Never to a process that is neither."""
    runner = _runner(folder)
    pid = _living(runner.get("shim")) or _living(runner.get("child"))
    if pid is not None:
        _send(pid, signal.SIGTERM)


def kill(folder: Path) -> None:
    """SIGKILL to all processes of the job."""
    if (pid := child_pid(folder)) is not None:
        try:
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:
            return


def verdict(end: Ending | None, *, asked: bool, done: bool, killed: bool = False) -> tuple[str, str | None]:
    """State and reason of a job that has ended, from intent, marker and exit code.

    A job that was asked to stop and one that reports 143 are stopped; one is succeeded if it left the marker and 0, or if nobody saw the
    code; all others failed.
    """
    if killed:
        return "failed", "stop_timeout: it did not stop in time and was killed; its last checkpoint may be old"
    if done and (end is None or end.code == 0):
        return "succeeded", None
    if asked or (end is not None and end.code == STOPPED):
        return "stopped", None
    if end is not None and end.error:
        return "failed", f"it could not be started: {end.error}"
    if end is None:
        return "failed", "lost: its processes are gone, and nobody saw how they ended"
    if end.signal == "SIGKILL":
        return "failed", "killed by SIGKILL; often the machine had no memory left"
    if end.signal:
        return "failed", f"ended by {end.signal}"
    return "failed", f"exit code {end.code}" if end.code else "it ended without an error before training was over"


def _send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _living(process: object) -> int | None:
    """The number of a recorded process, if that very process lives: number, start and boot are its own."""
    if not isinstance(process, dict) or process.get("boot_id") != boot_id():
        return None
    pid, ticks = process["pid"], process["start_ticks"]
    return pid if ticks is not None and start_ticks(pid) == ticks else None


def _runner(folder: Path) -> Mapping[str, object]:
    """The shim and the job's process, as the shim wrote them down; where that file is gone, as the list of processes shows them."""
    return _read(folder / "runner.json") or _seen(folder)


def _seen(folder: Path) -> dict[str, object]:
    """The shim and the job's process by their command lines, which name a file of the folder; either leads a session of its own."""
    found: dict[str, object] = {}
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or ()
        if str(folder / OVERLAY) in words and _leads(process.pid):
            found["shim" if shim.__file__ in words else "child"] = identity(process.pid)
    return found


def _leads(pid: int) -> bool:
    try:
        return os.getsid(pid) == pid
    except ProcessLookupError:
        return False


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    assert isinstance(found, dict)
    return found
