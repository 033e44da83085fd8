"""vLLM's processes in tests, started by the commands of the documentation."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Literal, NamedTuple

ROOT = Path(__file__).parents[2]
COMMAND = re.compile(r"(?:[A-Z_]+=\S+ )*(?:python -m vllm\.\S+|vllm serve)[^`|\n]*")
ON_A_CPU = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",
}
SMALL = ["--host", "127.0.0.1", "--max-num-seqs", "32", "--gpu-memory-utilization", "0.1", "--enforce-eager"]
LINES = 25
"""Last lines of a server's log in an error."""

Kind = Literal["adapters", "whole"]


class Documented(NamedTuple):
    """A command of the documentation. environment: the variables before it."""

    environment: dict[str, str]
    words: list[str]


def documented_commands() -> dict[Kind, str]:
    """The two commands in docs/methods.md that start vLLM: one for adapters, one for whole weights."""
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    adapters, whole = (found.group().strip() for found in COMMAND.finditer(page))
    return {"adapters": adapters, "whole": whole}


def filled_in(command: str, **values: str) -> Documented:
    """A command with its words in capitals, such as MODEL, exchanged for values."""
    words = [values.get(word, word) for word in shlex.split(command)]
    first = words.index("python")
    return Documented(dict(word.split("=", 1) for word in words[:first]), words[first:])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ServerProcess:
    """A server with all its children, in a process group of its own."""

    def __init__(self, command: list[str], environment: dict[str, str], port: int, log: Path) -> None:
        self.command, self.environment, self.log = command, environment, log
        self.url = f"http://127.0.0.1:{port}"

    def start(self, *, seconds: float = 480.0) -> None:
        """Start it and wait until it is healthy. Raises RuntimeError with the last lines of its log, at once where it has ended."""
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH" and not name.startswith("VLLM_")}
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                self.command, env=kept | self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        until = time.monotonic() + seconds
        while not self._healthy():
            ended = self.process.poll()
            if ended is not None or time.monotonic() > until:
                self.stop()
                why = f"is not healthy after {seconds:g} s" if ended is None else f"has ended with status {ended}"
                last = "\n".join(self.log.read_text(errors="replace").splitlines()[-LINES:])
                raise RuntimeError(f"{shlex.join(self.command)} {why}. The last lines of {self.log}:\n{last}")
            time.sleep(0.25)

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def stop(self) -> None:
        """End the process group: the engine is a child that outlives its parent otherwise."""
        for sent in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, sent)
            except ProcessLookupError:
                return
            until = time.monotonic() + 10
            while time.monotonic() < until and self.process.poll() is None:
                time.sleep(0.1)


def vllm(kind: Kind, model: Path, log: Path, *options: str, rank: int = 8) -> ServerProcess:
    """vLLM as it is documented for `kind`, with `options` and what a CPU and a small model need."""
    given = filled_in(documented_commands()[kind], MODEL=str(model), DTYPE="float32", RANK=str(rank))
    port = free_port()
    python = os.environ.get("VLLM_PYTHON", ".venv-vllm/bin/python")
    command = [python, *given.words[1:], "--port", str(port), *SMALL, *options]
    return ServerProcess(command, ON_A_CPU | given.environment, port, log)
