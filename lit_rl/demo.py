"""The demo: a miniature text-to-image model learns to write numbers from the answers of an OCR server.

    python -m lit_rl.demo [--method grpo|nft] [--seed 0]

Everything a real run does, in minutes on a CPU: a pipeline in diffusers format, a reward server in its own process, a supervised warm-up,
reinforcement learning continued from the warm-up's checkpoint, evaluation on held-out prompts, a picture of what was learned.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

CURVES, COMPARISON = Path("outputs/demo-curves.json"), Path("outputs/demo-methods.png")
ACCURACY = "val/ocr_similarity_perfect"
QUIET = {  # two processes on two cores, one thread each; no bars for the files of a 9 MB model
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore",
}


@dataclass(frozen=True)
class Demo:
    """One method's run of it: name, YAML and output folder, which the YAML names too."""

    title: str
    config: str
    out: Path


DEMOS = {
    "grpo": Demo("Flow-GRPO", "configs/demo/flow_grpo_ocr.yaml", Path("outputs/demo")),
    "nft": Demo("DiffusionNFT", "configs/demo/diffusion_nft_ocr.yaml", Path("outputs/demo-nft")),
}


@dataclass(frozen=True)
class Curve:
    """One logged number over the optimizer steps."""

    steps: list[int]
    values: list[float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=DEMOS, default="grpo")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    demo = DEMOS[args.method]
    out = demo.out
    if not Path(demo.config).is_file():
        raise SystemExit(f"error: {demo.config} is not here; run the demo from the folder of the repository")
    os.environ |= QUIET
    started = time.perf_counter()
    if out.exists():
        say(f"removing the previous demo in {out}/")
        shutil.rmtree(out)
    say(f"building a miniature SD3 pipeline in {out / 'model'}/")
    build_model(out / "model")
    seconds = {}
    with reward_server(out) as url:
        os.environ["REWARD_SERVER_URLS"] = url
        common = ["--config", demo.config, "--seed_everything", str(args.seed)]
        say("supervised warm-up on pictures of numbers, most of which have lines printed over them")
        seconds["warmup"] = cli("fit", *common, "--trainer.max_epochs", "1", "--trainer.check_val_every_n_epoch", "1")
        cli("predict", *common, "--ckpt_path", "last", "--images.output_dir", str(out / "images/after_warmup"))
        say(f"{demo.title} against the OCR server, continued from the warm-up's checkpoint")
        seconds["rl"] = cli("fit", *common, "--ckpt_path", "last")
        cli("predict", *common, "--ckpt_path", "last", "--images.output_dir", str(out / "images/after_rl"))
    summary = summarize(read_curves(out / "logs"), seconds=seconds, seed=args.seed)
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    draw(read_curves(out / "logs"), summary, demo)
    compare(remember(demo.title, args.seed, read_curves(out / "logs")))
    accuracy = summary["held_out_accuracy"]
    say(
        f"held-out numbers read correctly: {accuracy['after_warmup']:.0%} after the warm-up, {accuracy['after_rl']:.0%} after "
        f"{summary['images_trained']} images of reinforcement learning ({time.perf_counter() - started:.0f} s in all)"
    )
    tensorboard = Path(sys.executable).parent / "tensorboard"
    say(f"see {out / 'demo.png'}, {COMPARISON}, {out / 'summary.json'}, and: {tensorboard} --logdir {out / 'logs'}")


def say(message: str) -> None:
    print(f"\n== {message} ==", flush=True)


def build_model(folder: Path) -> None:
    from lit_rl.policies.tiny import build_sd3

    build_sd3(
        folder,
        height=16,
        width=16,
        factor=4,
        patch_size=1,
        hidden=96,
        heads=3,
        qk_norm=None,
        text_hidden=32,
        t5_hidden=None,
        shift=1.0,
    )


@contextmanager
def reward_server(folder: Path) -> Iterator[str]:
    """The URL of an OCR server of its own process on a free port; it is stopped when the block ends, however it ends."""
    ready, log = folder / "reward_server.url", folder / "reward_server.log"
    command = [sys.executable, "-m", "lit_rl.rewards.server", "--scorers", "ocr", "--port", "0", "--ready-file", str(ready)]
    with open(log, "wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 120
        while not ready.is_file():
            if server.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"error: the reward server did not start; its last words in {log}:\n{log.read_text()[-2000:]}")
            time.sleep(0.2)
        url = ready.read_text().strip()
        say(f"reward server {url} (process {server.pid}, log {log})")
        yield url
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=60)


def cli(*args: str) -> float:
    """Run `python cli.py ...` and return its seconds; a failure ends the demo with the same exit code."""
    command = [sys.executable, "cli.py", *args]
    print("$ python " + " ".join(command[1:]), flush=True)
    started = time.perf_counter()
    done = subprocess.run(command)
    if done.returncode:
        raise SystemExit(done.returncode)
    return time.perf_counter() - started


def read_curves(logs: Path) -> dict[str, Curve]:
    """Every scalar of the TensorBoard logs below a folder, in order of steps."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    points: dict[str, dict[int, float]] = {}
    for file in sorted(logs.rglob("events.out.tfevents.*"), key=lambda f: f.stat().st_mtime):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            points.setdefault(tag, {}).update({e.step: e.value for e in events.Scalars(tag)})
    return {tag: Curve(sorted(by_step), [by_step[s] for s in sorted(by_step)]) for tag, by_step in points.items()}


def summarize(curves: Mapping[str, Curve], *, seconds: Mapping[str, float], seed: int) -> dict[str, Any]:
    """What summary.json holds: accuracy is the share of evaluation images whose text the OCR engine reads exactly as prompted."""
    accuracy = curves[ACCURACY].values
    return {
        "held_out_accuracy": {"after_warmup": round(accuracy[0], 4), "after_rl": round(accuracy[-1], 4)},
        "images_trained": sum(round(n) for n in curves["images"].values),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "seed": seed,
    }


def draw(curves: Mapping[str, Curve], summary: Mapping[str, Any], demo: Demo, *, samples: int = 40) -> None:
    """One PNG: training reward and held-out accuracy over the images trained on; the same prompts and noises before and after."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, before, after) = plt.subplots(1, 3, figsize=(13, 4.2), width_ratios=[1.25, 1, 1], layout="constrained")
    seen = images_seen(curves)
    left.plot(seen[1:], curves["reward_mean"].values, color="#9aa5b1", label="training reward (mean of the iteration)")
    left.plot(*accuracy_over_images(curves), color="#1f6feb", marker="o", label="held-out prompts read exactly right")
    left.set(xlabel="images of reinforcement learning", ylim=(0, 1), title=f"{demo.title} against a live OCR server")
    left.grid(alpha=0.3)
    left.legend(loc="lower right")
    values = summary["held_out_accuracy"]
    for axis, name, title in ((before, "after_warmup", "after the warm-up"), (after, "after_rl", "after RL")):
        axis.imshow(contact_sheet(demo.out / "images" / name, samples), interpolation="nearest")
        axis.set_title(f"{title}: {values[name]:.0%} right")
        axis.axis("off")
    figure.savefig(demo.out / "demo.png", dpi=110)


def remember(method: str, seed: int, curves: Mapping[str, Curve]) -> dict[str, dict[str, list[list[float]]]]:
    """Accuracy over images of every demo run so far, by method and seed, this one included."""
    known: dict[str, dict[str, list[list[float]]]] = json.loads(CURVES.read_text()) if CURVES.is_file() else {}
    known.setdefault(method, {})[str(seed)] = list(accuracy_over_images(curves))
    CURVES.write_text(json.dumps(known, indent=2) + "\n")
    return known


def compare(known: Mapping[str, Mapping[str, list[list[float]]]]) -> None:
    """One PNG: held-out accuracy over the images trained on, a colour for each method and a line for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6.5, 4), layout="constrained")
    for i, (method, seeds) in enumerate(sorted(known.items())):
        for j, (images, accuracy) in enumerate(seeds.values()):
            axis.plot(images, accuracy, color=f"C{i}", marker="o", label=None if j else f"{method}, seed {', '.join(seeds)}")
    axis.set(xlabel="images of reinforcement learning", ylabel="held-out prompts read exactly right", ylim=(0, 1))
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right")
    figure.savefig(COMPARISON, dpi=110)


def images_seen(curves: Mapping[str, Curve]) -> list[float]:
    """Images before the first iteration, and after each."""
    return [0.0, *accumulate(curves["images"].values)]


def accuracy_over_images(curves: Mapping[str, Curve]) -> tuple[list[float], list[float]]:
    """Held-out accuracy, and how many images each evaluation came after; the warm-up's came after none."""
    seen, steps, accuracy = images_seen(curves), curves["images"].steps, curves[ACCURACY]
    return [seen[sum(step <= at for step in steps)] for at in accuracy.steps], accuracy.values


def contact_sheet(folder: Path, samples: int, *, columns: int = 5, zoom: int = 3) -> object:
    """The first images of a prediction in rows, each enlarged, with the number that was asked for beside it."""
    from PIL import Image, ImageDraw, ImageFont

    rows: Sequence[dict[str, str]] = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()][:samples]
    images = [Image.open(folder / row["file"]) for row in rows]
    width, height = images[0].width * zoom, images[0].height * zoom
    label, gap = 40, 6
    count = -(-len(images) // columns)
    sheet = Image.new("RGB", (label + columns * (width + gap), count * (height + gap)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(22)
    for i, (row, image) in enumerate(zip(rows, images)):
        line, column = divmod(i, columns)
        if column == 0:
            pen.text((2, line * (height + gap) + height // 4), row["prompt"].split('"')[1], fill="#1f6feb", font=font)
        sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), (label + column * (width + gap), line * (height + gap)))
    return sheet


if __name__ == "__main__":
    main()
