"""The demos: a miniature model learns to write numbers from the answers of an OCR server.

    python -m lit_rl.demo [--task text|fill|deepgen] [--method grpo|nft] [--seed 0]

`text` is a text-to-image model, `fill` one that rewrites signs in the ink of a reference image, `deepgen` a language model and a diffusion
transformer that are trained together, against a judge of pairs as well. Everything a real run does, in minutes on a
CPU: a pipeline in diffusers format, a reward server in its own process, a supervised warm-up, reinforcement learning continued from the
warm-up's checkpoint, evaluation on held-out prompts, a picture of what was learned.
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
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lit_rl.demo.commands import begin, cli, say
from lit_rl.demo.curves import held_out, read_curves, remember, summarize
from lit_rl.demo.pictures import compare, draw
from lit_rl.demo.tasks import TASKS

LINES = ("--scorers", "ocr", "--scorer-args", '{"ocr": {"detect": false}}')
"""The pictures are one line of text each."""


def main() -> None:
    """Run the demo of a task and method."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--task", choices=TASKS, default="text")
    parser.add_argument("--method", choices=("grpo", "nft"), default="grpo")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    task = TASKS[args.task]
    if args.method not in task.runs:
        raise SystemExit(f"error: the demo {args.task} has the method {', '.join(task.runs)}, not {args.method}")
    run = task.runs[args.method]
    out = run.out
    started = begin(run.config)
    if out.exists():
        say(f"removing the previous demo in {out}/")
        shutil.rmtree(out)
    say(f"building a miniature {task.model} pipeline in {out / 'model'}/")
    task.prepare(out, args.seed)
    seconds = {}
    with ExitStack() as servers:
        os.environ["REWARD_SERVER_URLS"] = servers.enter_context(server(out, "reward server", "lit_rl.rewards.server", *LINES))
        if task.judge:
            url = servers.enter_context(server(out, "judge", "lit_rl.demo.judge"))
            os.environ |= dict.fromkeys(("UNIFIEDREWARD_THINK_URL", "UNIGENBENCH_API_URL"), url)
        common = ["--config", run.config, "--seed_everything", str(args.seed)]
        say(f"supervised warm-up on {task.warmup}")
        seconds["warmup"] = cli("fit", *common, "--trainer.max_epochs", "1", "--trainer.check_val_every_n_epoch", "1")
        if task.predicts:
            cli("predict", *common, "--ckpt_path", "last", "--images.output_dir", str(out / "images/after_warmup"))
        say(f"{run.title} against {task.against}, continued from the warm-up's checkpoint")
        seconds["rl"] = cli("fit", *common, "--ckpt_path", "last")
        if task.predicts:
            cli("predict", *common, "--ckpt_path", "last", "--images.output_dir", str(out / "images/after_rl"))
    curves = read_curves(out / "logs")
    accuracy = held_out(curves, task.scores)["held_out_accuracy"]
    summary = summarize(curves, task.scores, seconds=seconds, seed=args.seed)
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    draw(out / "demo.png", f"{run.title} against {task.against}", curves, task.scores, task.panels(out, accuracy))
    compare(task.comparison, remember(task.curves, run.title, args.seed, curves, tag=task.scores["held_out_accuracy"]))
    say(
        f"held-out numbers read correctly: {accuracy['after_warmup']:.0%} after the warm-up, {accuracy['after_rl']:.0%} after "
        f"{summary['images_trained']} images of reinforcement learning ({time.perf_counter() - started:.0f} s in all)"
    )
    tensorboard = Path(sys.executable).parent / "tensorboard"
    say(f"see {out / 'demo.png'}, {task.comparison}, {out / 'summary.json'}, and: {tensorboard} --logdir {out / 'logs'}")


@contextmanager
def server(folder: Path, name: str, module: str, *options: str) -> Iterator[str]:
    """The URL of a server of its own process on a free port; it is stopped when the block ends, however it ends."""
    ready, log = (folder / f"{name.replace(' ', '_')}.{suffix}" for suffix in ("url", "log"))
    command = [sys.executable, "-m", module, "--port", "0", "--ready-file", str(ready), *options]
    with open(log, "wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 120
        while not ready.is_file():
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"error: the {name} did not start; its last words in {log}:\n{log.read_text()[-2000:]}")
            time.sleep(0.2)
        url = ready.read_text().strip()
        say(f"{name} {url} (process {process.pid}, log {log})")
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


if __name__ == "__main__":
    main()
