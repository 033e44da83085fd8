"""Two gloo processes that stay alive for many tests, in an environment as torchrun makes it."""

from __future__ import annotations

import json
import os
import socket
import time
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from forked import FORKS, forked
from worker import serve


class Pair:
    def __init__(self, folder: Path, size: int = 2) -> None:
        self.folder, self.size, self.calls = folder, size, 0
        self.processes: list[BaseProcess] = []
        self.calling: list[Connection] = []

    def start(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        common = {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(self.size), "LOCAL_WORLD_SIZE": str(self.size),
            "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "tests", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1",
            "GLOO_SOCKET_IFNAME": "lo",
        }  # fmt: skip
        for rank in range(self.size):
            called, calling = FORKS.Pipe(duplex=False)
            ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            log = self.folder / f"rank{rank}.log"
            self.processes.append(forked(serve, called, os.getpid(), folder=Path.cwd(), log=log, environment=os.environ | common | ranks))
            self.calling.append(calling)
            called.close()

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        for calling in self.calling:
            calling.close()
        self.processes, self.calling = [], []

    def run(self, function: str, *, timeout: float = 300, **arguments: Any) -> list[Any]:
        """`function(**arguments)`, of `scenarios` or, as "room.function", of another file here, on every rank; what each returned.

        Raises RemoteError with what each rank said.
        """
        if not self.processes:
            self.start()
        self.calls += 1
        answer = self.folder / f"answer{self.calls}"
        for calling in self.calling:
            calling.send({"function": function, "arguments": arguments, "answer": str(answer)})
        answers = self._wait([answer.with_name(f"{answer.name}.{rank}") for rank in range(self.size)], timeout)
        if any(a is None or "error" in a for a in answers):
            if any(a is None for a in answers):  # the others wait for it in a collective
                self.stop()
            raise RemoteError([a["error"] if a and "error" in a else str(a) for a in answers], self._tails(answers))
        return [a["result"] for a in answers if a is not None]

    def _wait(self, files: list[Path], timeout: float) -> list[dict[str, Any] | None]:
        deadline = time.monotonic() + timeout
        while not all(file.exists() for file in files) and time.monotonic() < deadline:
            failed = [file for file in files if file.exists() and "error" in json.loads(file.read_text())]
            if failed or any(process.exitcode is not None for process in self.processes):
                deadline = min(deadline, time.monotonic() + 5)
            time.sleep(0.02)
        return [json.loads(file.read_text()) if file.exists() else None for file in files]

    def _tails(self, answers: list[dict[str, Any] | None]) -> str:
        traces = [a.get("traceback", "") for a in answers if a]
        logs = [(self.folder / f"rank{rank}.log").read_text()[-3000:] for rank in range(self.size)]
        return "\n".join([*traces, *logs])


class RemoteError(Exception):
    """Holds the error of each rank, and their logs."""

    def __init__(self, errors: list[str], logs: str) -> None:
        super().__init__("\n".join(errors) + "\n" + logs)
        self.errors = errors
