"""Prints what several processes cost and what a lost one costs, on the CPU of this machine.

    python -m benchmarks.scale [--kills 20]

Efficiency: the seconds of a step on one process, beside those of two processes that share the same work, on two cores; and beside two
single runs at once, which share nothing but the machine. Then four processes, one of which is killed so many times at random steps: the
seconds lost for each restart, and the largest difference of any weight from the unbroken run. The run is the toy of the tests.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

ROOT = Path(__file__).resolve().parents[1]
TESTS = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/launch")]
WIDE, EPOCHS = 1024, 12


def config(folder: Path, *, width: int, epochs: int, every: int = 1) -> Path:
    """The toy's run with a checkpoint after every so many steps; a step of a wide one is mostly arithmetic."""
    from test_launched_runs import config as small

    run: dict[str, Any] = yaml.safe_load(small(folder).read_text())
    run["model"]["init_args"]["policy"]["init_args"] = {"width": width}
    run["model"]["init_args"] |= {"group_size": 64 if width == WIDE else 4}
    run["trainer"] |= {"max_epochs": epochs}
    run["trainer"]["callbacks"][-1]["init_args"]["every_n_train_steps"] = every
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return folder / "run.yaml"


def started(folder: Path, processes: int, *, restarts: int = 0) -> subprocess.Popen[bytes]:
    """The launcher, with its processes, on the run of a folder."""
    words = ["--nproc-per-node", str(processes), "--restarts", str(restarts), "--", "fit", "--config", str(folder / "run.yaml")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(TESTS), "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("wb") as log:
        return subprocess.Popen([sys.executable, "-m", "lit_rl.launch", *words], env=environment, stdout=log, stderr=log, cwd=ROOT)


def seconds(*runs: tuple[Path, int]) -> float:
    """The longest time that one of several runs at once, each with its number of processes, is between its first and last checkpoint."""
    for process in [started(folder, processes) for folder, processes in runs]:
        assert process.wait() == 0
    times = [sorted(file.stat().st_mtime for file in (folder / "checkpoints").glob("epoch*.ckpt")) for folder, _ in runs]
    return max(found[-1] - found[0] for found in times)


def efficiency(root: Path) -> None:
    """Print the three times, and the speed-up of two processes over one."""

    def folder(name: str) -> Path:
        (root / name).mkdir()
        file = config(root / name, width=WIDE, epochs=EPOCHS)
        run = yaml.safe_load(file.read_text())
        run["trainer"]["callbacks"][-1]["init_args"] |= {
            "filename": "{epoch}",
            "every_n_train_steps": None,
            "every_n_epochs": 1,
            "save_top_k": -1,
        }
        file.write_text(yaml.safe_dump(run))
        return root / name

    one = seconds((folder("one"), 1)) / (EPOCHS - 1)
    both = seconds((folder("left"), 1), (folder("right"), 1)) / (EPOCHS - 1)
    two = seconds((folder("two"), 2)) / (EPOCHS - 1)
    print(f"an iteration: {one:.3f} s on one process, {both:.3f} s in each of two single runs at once, {two:.3f} s on two processes")
    of_machine = both / two / 2
    print(f"two are {one / two:.2f} times as fast as one; efficiency {one / two / 2:.0%}, of what the machine gives {of_machine:.0%}")


def survived(root: Path, kills: int) -> None:
    """Print what random kills of one of four processes have changed, and what each took."""
    epochs = max(8, kills)
    ends, times = [], []
    for name, killed in (("unbroken", 0), ("killed", kills)):
        folder = root / name
        folder.mkdir()
        config(folder, width=16, epochs=epochs)
        for step in random.sample(range(1, 2 * epochs), killed):
            (folder / f"{step}.{random.randrange(4)}.SIGKILL").touch()
        begun = time.monotonic()
        if started(folder, 4, restarts=killed).wait() != 0:
            raise SystemExit((folder / "log").read_text()[-3000:])
        times.append(time.monotonic() - begun)
        ends.append(torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"])
    apart = max(float((ends[0][name] - ends[1][name]).abs().max()) for name in ends[0])
    print(f"{kills} kills of one of four processes: weights differ by {apart:.1e}, {(times[1] - times[0]) / kills:.1f} s for each restart")


def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--kills", type=int, default=3, help="random kills of one of four processes (default: %(default)s)")
    args = p.parse_args(argv)
    sys.path[:0] = TESTS
    with tempfile.TemporaryDirectory() as folder:
        efficiency(Path(folder))
        if args.kills:
            survived(Path(folder), args.kills)


if __name__ == "__main__":
    main()
