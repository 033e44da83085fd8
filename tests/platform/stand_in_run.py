"""Stands in for `cli.py` of a run: counts its starts, works until it is told to end, and stops on SIGTERM with a checkpoint and 143."""

import json
import os
import signal
import sys
import time
from pathlib import Path

folder = Path(sys.argv[sys.argv.index("--config", sys.argv.index("--config") + 1) + 1]).parent


def stop(number, frame):
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "checkpoints/last.ckpt").write_text("weights")
    sys.exit(143)


signal.signal(signal.SIGTERM, stop)
with (folder / "starts").open("a") as file:
    file.write(f"{os.getpid()}\n")
print("argv", json.dumps(sys.argv[1:]), flush=True)
print("sees", os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ["JOB_UUID"], os.environ.get("LD_PRELOAD"), flush=True)
while not (folder / "finish").exists():
    time.sleep(0.02)
code = (folder / "finish").read_text()
if code == "0":
    Path(os.environ["PLATFORM_DONE_FILE"]).write_text("{}")
elif code != "-0":
    print("error: run.yaml:3: the test says so", flush=True)
sys.exit(int(code))
