"""A reward server as a child process, with its log."""

from __future__ import annotations

import ctypes
import http.client
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

_PR_SET_PDEATHSIG = 1


@dataclass
class ServerProcess:
    """One server process, its address and its log."""

    gpu: str
    host: str
    port: int
    options: Sequence[str]
    log: Path
    token: str | None = None
    process: subprocess.Popen[bytes] | None = None
    restarts: int = 0
    start_at: float = 0.0
    ready_since: float | None = None

    @property
    def name(self) -> str:
        """GPU and address, for messages."""
        return f"server on GPU {self.gpu} at {self.host}:{self.port}"

    def start(self) -> None:
        """Start the process; its output goes to the log."""
        self.ready_since = None
        command = [sys.executable, "-m", "lit_rl.rewards.server", "--host", self.host, "--port", str(self.port), *self.options]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment(),
                start_new_session=True,  # Ctrl+C reaches the launcher alone, which then stops the servers in order
                preexec_fn=die_with_parent(),
            )

    def environment(self) -> dict[str, str]:
        """This process's, with the server's GPU and token."""
        own = {"CUDA_VISIBLE_DEVICES": self.gpu, "PYTHONUNBUFFERED": "1"} | ({"REWARD_TOKEN": self.token} if self.token else {})
        return dict(os.environ) | own

    def healthy(self) -> bool:
        """True when the server answers GET /health with 200."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        connection = http.client.HTTPConnection(host, self.port, timeout=1.0)  # unlike urllib it ignores http_proxy
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def last_words(self) -> str:
        """The last line of the log."""
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else "nothing was logged"


def die_with_parent() -> Callable[[], None] | None:
    """For the forked child: SIGKILL as soon as the parent is gone, whatever ended it (Linux)."""
    if sys.platform != "linux":
        return None
    libc, parent = ctypes.CDLL(None), os.getpid()

    def prepare() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it went away before the call above
            os._exit(1)

    return prepare
