"""The beginning of a demo, and its commands `python cli.py ...`, each in a copy of this process, which has imported what all import."""

from __future__ import annotations

import os
import runpy
import sys
import time
import warnings
from multiprocessing import get_context
from pathlib import Path

from lit_rl.command_line.imports import quick_imports

QUIET = {  # two processes on two cores, one thread each; no bars for the files of a 9 MB model
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore",
}


def begin(config: str) -> float:
    """Set the environment of the demo's processes and return the time, see `time.perf_counter`. Raises SystemExit without this YAML."""
    if not Path(config).is_file():
        raise SystemExit(f"error: {config} is not here; run the demo from the folder of the repository")
    os.environ |= QUIET
    return time.perf_counter()


def say(message: str) -> None:
    """Print a line."""
    print(f"\n== {message} ==", flush=True)


def cli(*args: str) -> float:
    """Run `python cli.py ...` and return its seconds; a failure ends the demo with the same exit code.

    The copy is a fork, so that the seconds of the imports are spent once for all commands of a demo.
    """
    command = ["cli.py", *args]
    print("$ python " + " ".join(command), flush=True)
    import_once()
    started = time.perf_counter()
    process = get_context("fork").Process(target=run_command, args=(command,))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(process.exitcode)
    return time.perf_counter() - started


def import_once() -> None:
    """Import what every command imports."""
    with quick_imports():
        import lit_rl.command_line.run  # noqa: F401


def run_command(command: list[str]) -> None:
    """Run a script with its arguments as `python` does, without the warnings that the demos' environment turns off."""
    sys.argv = command
    warnings.simplefilter("ignore")
    runpy.run_path(command[0], run_name="__main__")
