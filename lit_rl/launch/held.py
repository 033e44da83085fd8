"""Runs a program that ends with the process which started it.

    python -m lit_rl.launch.held PROGRAM ARGUMENT ...

The input is a pipe whose other end the starting process holds. When that closes, the program and all that it started are killed, unless
they have been asked to stop before: then they may finish. SIGTERM and SIGINT are handed on. Exits with the program's code, or 128 + the
signal that ended it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence

import psutil

PR_SET_CHILD_SUBREAPER = 36
SIGNALS = (signal.SIGTERM, signal.SIGINT)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a program to its end; the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if sys.platform == "linux":  # what a child leaves behind becomes a child of this process
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    asked = threading.Event()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until there is a program to hand them on to
    try:
        child = subprocess.Popen(words, stdin=subprocess.DEVNULL, preexec_fn=_unblock)
    except OSError as error:
        sys.stderr.write(f"error: {words[0]} cannot be started: {error.strerror}\n")
        return 127
    for number in SIGNALS:
        signal.signal(number, lambda number, _: _hand_on(child, number, asked))
    _unblock()
    threading.Thread(target=_watch, args=(asked,), daemon=True).start()
    code = child.wait()
    _kill_all()
    return code if code >= 0 else 128 - code


def _unblock() -> None:
    """Ray blocks SIGINT in its processes, and a blocked signal stays so in what they start."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _hand_on(child: subprocess.Popen[bytes], number: int, asked: threading.Event) -> None:
    asked.set()
    if child.returncode is None:
        child.send_signal(number)


def _watch(asked: threading.Event) -> None:
    """Wait for the other end of the pipe to be closed, which also the kernel does, for a process that was killed."""
    while os.read(0, 1):
        pass
    if not asked.is_set():
        _kill_all()


def _kill_all() -> None:
    while found := psutil.Process().children(recursive=True):
        for process in found:
            _kill(process)
        if not psutil.wait_procs(found, timeout=5)[0]:
            return


def _kill(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return


if __name__ == "__main__":
    sys.exit(main())
