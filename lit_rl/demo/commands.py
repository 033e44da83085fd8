"""Commands of a demo, `python cli.py ...`, each in a copy of this process, which has imported what all of them import."""

from __future__ import annotations

import runpy
import sys
import time
import warnings
from multiprocessing import get_context

from lit_rl.command_line.imports import quick_imports


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
