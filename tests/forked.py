"""Processes that are forked from one that has imported everything: a start takes milliseconds in place of seconds of imports.

For tests that stop, kill or freeze runs, and for processes that train together; not for tests of what a fresh interpreter imports.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import runpy
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.forkserver import ensure_running
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["preloaded"])


def forked(function: Callable[..., Any], *arguments: Any, folder: Path, log: Path, environment: Mapping[str, str]) -> BaseProcess:
    """A process in a group of its own that calls `function(*arguments)` in `folder` and appends what it says to `log`."""
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests/scale")))
    try:
        ensure_running()
    finally:
        os.environ.pop("PYTHONPATH") if path is None else os.environ.update(PYTHONPATH=path)
    process = FORKS.Process(target=enter, args=(function, arguments, folder, log, dict(environment)), daemon=True)
    process.start()
    return process


def forked_script(*words: str, folder: Path, environment: Mapping[str, str] | None = None, kib: int | None = None) -> BaseProcess:
    """`python *words`, its output in `folder`/log. It may write files of at most `kib` KiB."""
    path = {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))}
    folder.mkdir(exist_ok=True)
    given = os.environ if environment is None else environment
    return forked(run_script, words, kib, folder=folder, log=folder / "log", environment={**given, **path})


class ForkedModule:
    """`subprocess.Popen` of `python -m module ...` whose output is asked for."""

    def __init__(self, command: Sequence[str], *, env: Mapping[str, str], cwd: Path = ROOT, **_: object) -> None:
        assert command[1] == "-m"
        self.folder = Path(tempfile.mkdtemp())
        where: dict[str, Any] = {"folder": cwd, "log": self.folder / "log", "environment": env}
        self.process = forked(run_module, command[2:], self.folder / "said", **where)
        self.returncode: int | None = None

    def communicate(self) -> tuple[str, None]:
        self.process.join()
        self.returncode = self.process.exitcode
        assert self.returncode == 0, (self.folder / "log").read_text()
        said = (self.folder / "said").read_text()
        shutil.rmtree(self.folder)
        return said, None


def ended(process: BaseProcess, timeout: float) -> int | None:
    """Its exit code, None where it is still there after so many seconds."""
    process.join(timeout)
    return process.exitcode


def end_group(process: BaseProcess) -> None:
    """Kill a process and all that it has started, frozen ones too."""
    assert process.pid is not None
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()


def run_script(words: list[str], kib: int | None) -> None:
    if kib is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (kib * 1024, kib * 1024))
    sys.argv = list(words)
    sys.path[:0] = [str(Path(words[0]).parent)]
    runpy.run_path(words[0], run_name="__main__")


def run_module(words: list[str], output: Path) -> None:
    sys.argv = list(words)
    with output.open("w") as sys.stdout:
        runpy.run_module(words[0], run_name="__main__")


def enter(function: Callable[..., Any], arguments: tuple[Any, ...], folder: Path, log: Path, environment: dict[str, str]) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    function(*arguments)
