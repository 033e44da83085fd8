"""A program on a node of a Ray cluster, whose lines and exit code go to the one who has placed it there."""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from lit_rl.net.sockets import bind

MOST_LINES = 1000


class Place(NamedTuple):
    """A node as others reach it: name and IP address, a port of it that is free, the Python and the folder of its processes."""

    host: str
    address: str
    port: int
    python: str
    folder: str


class Placed:
    """Ray makes an actor of it. The program ends with the actor, see `lit_rl.launch.held`."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def place(self) -> Place:
        """Returns where the program will run."""
        import ray

        address = ray.util.get_node_ip_address()
        with bind("::" if ":" in address else "0.0.0.0", 0) as free:
            port = int(free.getsockname()[1])
        return Place(socket.gethostname(), address, port, sys.executable, str(Path.cwd()))

    def start(self, words: Sequence[str], environment: Mapping[str, str]) -> int:
        """Start the program in this working folder, which it can import from; the number of the process that holds it.

        Ray sets OMP_NUM_THREADS to the CPUs of the actor, which all processes of the node would take.
        """
        own = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        path = os.pathsep.join(filter(None, [str(Path.cwd()), environment.get("PYTHONPATH", ""), own.get("PYTHONPATH", "")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "lit_rl.launch.held", *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", env={**own, **environment, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}, start_new_session=True,
        )  # fmt: skip
        assert self._process.stdout is not None
        threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True).start()
        return self._process.pid

    def said(self, patience: float = 1.0) -> tuple[list[str], int | None]:
        """The lines since the last question, for the first of which it waits some seconds; with the last of them the exit code."""
        assert self._process is not None
        code, lines = self._process.poll(), list[str]()
        while len(lines) < MOST_LINES:
            try:
                lines.append(self._lines.get(timeout=0.05 if lines else patience))
            except queue.Empty:
                break
        ended = code is not None and len(lines) < MOST_LINES
        return lines, (code if code is None or code >= 0 else 128 - code) if ended else None

    def send(self, number: int) -> None:
        """Send a signal to the program, if it has not ended."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.Signals(number))

    def _read(self, output: IO[str]) -> None:
        for line in output:
            self._lines.put(line.rstrip("\n"))
