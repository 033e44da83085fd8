"""CPU seconds of whole demos beside those of an earlier commit: same images, updates and evaluations, and the accuracy of both.

    python -m benchmarks.demos [--before 28cc53a] [--demo text llm] [--seeds 0 1]

Both trees are laid out from git in a temporary folder and take turns; each demo is what `make demo` and `make demo-llm` run, from an empty
folder, with all processes that it starts (the reward server, too). CPU seconds are user and system time, which other work on the machine
lengthens least. Images or answers, optimizer steps and evaluations are counted in what the demo wrote; the benchmark fails where they
differ. Takes ten minutes or more for each seed. The OCR engine of 28cc53a is a package that the project no longer needs:

    python -m pip install --no-deps --target FOLDER rapidocr_onnxruntime==1.4.4 pyclipper shapely
    PYTHONPATH=FOLDER python -m benchmarks.demos
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lit_rl.demo.curves import read_curves

ROOT = Path(__file__).parents[1]
MODULES = {"text": "lit_rl.demo", "llm": "lit_rl.demo.sorting"}
FOLDERS = {"text": "outputs/demo", "llm": "outputs/demo-llm"}


@dataclass(frozen=True)
class Found:
    """A demo that ran: what it trained on, and what it took and reached."""

    seconds: float
    samples: int
    steps: list[int]  # the last step of each of its logs, in order
    evaluations: int
    accuracy: float

    @property
    def work(self) -> tuple[int, list[int], int]:
        """The work that both trees have to do alike."""
        return self.samples, self.steps, self.evaluations


def laid_out(commit: str, folder: Path) -> Path:
    """The tree of a commit in a new folder."""
    folder.mkdir()
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x"], cwd=folder, input=archive, check=True)
    return folder


def run(tree: Path, demo: str, seed: int) -> Found:
    """A demo from an empty folder. Raises SystemExit where it fails."""
    subprocess.run(["rm", "-rf", str(tree / "outputs")], check=True)
    before, log = resource.getrusage(resource.RUSAGE_CHILDREN), tree / "demo.log"
    with open(log, "wb") as output:
        command = [sys.executable, "-m", MODULES[demo], "--seed", str(seed)]
        paths = {"PYTHONPATH": os.pathsep.join([str(tree), *filter(None, [os.environ.get("PYTHONPATH")])])}
        done = subprocess.run(command, cwd=tree, env=os.environ | paths, stdout=output, stderr=subprocess.STDOUT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"error: the demo failed: {log.read_text()[-2000:]}")
    return found(tree / FOLDERS[demo], after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def found(out: Path, seconds: float) -> Found:
    """Counts and accuracy of a demo that wrote into `out`."""
    summary = json.loads((out / "summary.json").read_text())
    curves = [read_curves(folder) for folder in sorted({file.parent for file in out.rglob("events.*")})]
    values = [curve for log in curves for name, curve in log.items() if name.startswith("val/")]
    steps = sorted(max(curve.steps[-1] for curve in log.values()) for log in curves)
    return Found(
        seconds=seconds,
        samples=summary.get("images_trained") or summary["answers_trained"],
        steps=steps,
        evaluations=max(len(curve.values) for curve in values),
        accuracy=summary["held_out_accuracy"]["after_rl"],
    )


def row(demo: str, seed: int, before: Found, now: Found) -> str:
    """A row of the table of docs/benchmarks.md. Raises SystemExit where the two did not do the same work."""
    if before.work != now.work:
        raise SystemExit(f"error: the two demos did not do the same: {before.work} images, steps, evaluations then, {now.work} now")
    ratio = now.seconds / before.seconds
    accuracy = f"{before.accuracy:.3f} / {now.accuracy:.3f}"
    return f"| {demo}, seed {seed} | {now.samples} | {before.seconds:.0f} s | {now.seconds:.0f} s | **{ratio:.2f}** | {accuracy} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", default="28cc53a", help="the earlier commit")
    parser.add_argument("--demo", nargs="+", choices=MODULES, default=list(MODULES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        trees = laid_out(args.before, Path(folder) / "before"), laid_out("HEAD", Path(folder) / "now")
        print("| demo | images or answers | before | now | now / before | accuracy, before / now |\n| --- | --- | --- | --- | --- | --- |")
        for seed in args.seeds:
            for demo in args.demo:
                print(row(demo, seed, *(run(tree, demo, seed) for tree in trees)), flush=True)


if __name__ == "__main__":
    main()
