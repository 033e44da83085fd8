"""One process of a pair: runs the scenarios that it is sent and answers with files."""

from __future__ import annotations

import json
import os
import threading
import time
import traceback
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path


def leave_with(parent: int) -> None:
    """A collective that waits for a dead rank must not outlive the tests."""
    try:
        while True:
            os.kill(parent, 0)
            time.sleep(1)
    except ProcessLookupError:
        os._exit(1)


def serve(calls: Connection, parent: int) -> None:
    threading.Thread(target=leave_with, args=(parent,), daemon=True).start()
    while True:
        try:
            call = calls.recv()
        except EOFError:
            return
        room, _, function = call["function"].rpartition(".")
        try:
            answer = {"result": getattr(import_module(room or "scenarios"), function)(**call["arguments"])}
        except (Exception, SystemExit) as error:
            answer = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        target = Path(call["answer"] + f".{os.environ['RANK']}")
        target.with_suffix(".tmp" + os.environ["RANK"]).write_text(json.dumps(answer))
        target.with_suffix(".tmp" + os.environ["RANK"]).rename(target)
