"""The parent of a job's process: it outlives the service, and leaves the exit code in a file.

    python -m lit_rl.platform.shim RUN_DIR -- PROGRAM ARGUMENT ...

RUN_DIR/run.lock is held as long as this process or the job lives, so that one folder never has two of them. RUN_DIR/runner.json says who
they are, RUN_DIR/exit.json how the job ended, RUN_DIR/stdout.log what it printed.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

REFUSED = 3
"""Exit code of a shim whose folder has, or had, another one."""


def write_whole(path: Path, value: object) -> None:
    """A JSON file that is there whole or not at all, also after a power cut."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("w") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def start_ticks(pid: int) -> int | None:
    """Returns the start of a process, in clock ticks since the machine's; None where there is none. Together with the boot it is unique."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return None if fields[0] == "Z" else int(fields[19])


def boot_id() -> str:
    """The id of this boot of the machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def identity(pid: int) -> dict[str, object]:
    """Number, start and boot, which tell a process from a later one of the same number."""
    return {"pid": pid, "start_ticks": start_ticks(pid), "boot_id": boot_id()}


def main(argv: list[str] | None = None) -> int:
    """Run a job to its end; the exit code."""
    words = sys.argv[1:] if argv is None else argv
    folder, command = Path(words[0]), words[2:]
    lock = os.open(folder / "run.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    if not _taken(lock) or (folder / "runner.json").exists():
        return REFUSED
    runner: dict[str, object] = {"shim": identity(os.getpid()), "child": None, "argv": command}
    write_whole(folder / "runner.json", runner)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # until there is a child to hand it on to
    with (folder / "stdout.log").open("ab") as log:
        try:
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=(lock,), start_new_session=True,
                preexec_fn=_unblock,
            )  # fmt: skip
        except OSError as error:
            write_whole(folder / "exit.json", {"returncode": None, "signal": None, "error": str(error)})
            return 1
    signal.signal(signal.SIGTERM, lambda number, frame: _hand_on(child, number, frame))
    write_whole(folder / "runner.json", runner | {"child": identity(child.pid)})
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    code = child.wait()
    ended_by = signal.Signals(-code).name if code < 0 else None
    write_whole(folder / "exit.json", {"returncode": code if code >= 0 else 128 - code, "signal": ended_by})
    return 0


def _taken(lock: int) -> bool:
    """Take the lock. Whoever looks whether it is held, holds it for a moment, so that one refusal is none."""
    for _ in range(20):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.05)
    return False


def _unblock() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _hand_on(child: subprocess.Popen[bytes], number: int, _: FrameType | None) -> None:
    if child.returncode is None:
        child.send_signal(number)  # to the leader alone: it tells its other processes itself


if __name__ == "__main__":
    sys.exit(main())
