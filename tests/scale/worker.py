"""One process of a pair: runs the scenarios that arrive as JSON lines on stdin and answers with files."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from importlib import import_module
from pathlib import Path


def leave_with(parent: int) -> None:
    """A collective that waits for a dead rank must not outlive the tests."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main() -> None:
    threading.Thread(target=leave_with, args=(os.getppid(),), daemon=True).start()
    for line in sys.stdin:
        call = json.loads(line)
        room, _, function = call["function"].rpartition(".")
        try:
            answer = {"result": getattr(import_module(room or "scenarios"), function)(**call["arguments"])}
        except (Exception, SystemExit) as error:
            answer = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        target = Path(call["answer"] + f".{os.environ['RANK']}")
        target.with_suffix(".tmp" + os.environ["RANK"]).write_text(json.dumps(answer))
        target.with_suffix(".tmp" + os.environ["RANK"]).rename(target)


if __name__ == "__main__":
    main()
