"""The demo of agents: a miniature Qwen3-VL learns to hit a button that jumps, from demonstrations and then from success alone.

    python -m lit_rl.demo.desktop [--method grpo|lora] [--seed 0]

A model with tokenizer and image processor in transformers format, episodes of an oracle on training tasks, supervised fine-tuning that
stops half-way, multi-turn GRPO of every weight or of an adapter, evaluation of sampled episodes on held-out tasks, film strips of the same
tasks before and after.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lit_rl.agents.records import read_records
from lit_rl.demo.commands import begin, cli, say
from lit_rl.demo.curves import Curve, read_curves
from lit_rl.demo.stages import Reached, arguments, exported, kept, plot, reached

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

OUT = Path("outputs/demo-agent")
METHODS = {"grpo": "GRPO of every weight", "lora": "GRPO of an adapter"}
TASKS = Path("configs/agent/tasks")
WORDS = ("user\n", "assistant\n", "click", " red", " green", " blue", " yellow", " 0", " 1", " 2")
"""All that is said in these episodes, one token each."""
DEMONSTRATIONS, SIZE = 512, 96
OTHER_SHAPES = 512
"""The first of the buttons' shapes on the screens that say when the fine-tuning is to stop."""
SHOWN = 4
"""Held-out tasks whose film strips are in the picture."""
ACCURACY = "val/accuracy"


def main() -> None:
    """Run the demo of an agent."""
    args = arguments(__doc__, METHODS)
    method, title, seed = args.method, METHODS[args.method], ["--seed_everything", str(args.seed)]
    started = begin(config(method))
    seconds = {"warmup": kept(OUT, args.seed, partial(warm_start, args.seed))}
    shutil.rmtree(OUT / method, ignore_errors=True)
    say(f"{title} by the success of episodes alone, from the fine-tuned model")
    seconds["rl"] = cli("fit", "--config", config(method), *seed)
    before, curves = read_curves(OUT / "before/logs")[ACCURACY].values[-1], read_curves(OUT / method / "logs")
    summary = summarize(before, curves, read_records(OUT / method / "episodes/rollouts.jsonl")[1], seconds=seconds, seed=args.seed)
    name = "demo" if method == "grpo" else f"demo-{method}"
    (OUT / name.replace("demo", "summary")).with_suffix(".json").write_text(json.dumps(summary, indent=2) + "\n")
    draw(OUT / f"{name}.png", title, before, curves, [films(OUT / run / "episodes/film") for run in ("before", method)])
    accuracy = summary["held_out_accuracy"]
    say(
        f"held-out tasks done, sampled at temperature 1: {accuracy['after_warmup']:.0%} after fine-tuning, {accuracy['after_rl']:.0%} "
        f"after {title} on {summary['episodes_trained']} episodes ({time.perf_counter() - started:.0f} s in all)"
    )
    say(f"see {OUT / name}.png and {OUT / method / 'episodes/rollouts.jsonl'}")


def config(stage: str) -> str:
    """Path of the YAML of a stage."""
    return f"configs/demo/agent_{stage}.yaml"


def warm_start(seed: int) -> float:
    """Make the fine-tuned model that all methods start from, evaluate it, and return the seconds of the former."""
    say(f"building a miniature Qwen3-VL in {OUT / 'model'}/, and having an oracle do tasks for {OUT / 'data'}/")
    prepare(OUT, seed)
    say("supervised fine-tuning on what the oracle did, stopped half-way")
    seconds = cli("fit", "--config", config("sft"), "--seed_everything", str(seed))
    shutil.copytree(exported(OUT / "sft"), OUT / "warm_start")
    say("what it can do so far: sampled episodes of held-out tasks")
    cli("validate", "--config", config("grpo"), "--run.name", "before", "--seed_everything", str(seed))
    return seconds


def prepare(out: Path, seed: int, *, demonstrations: int = DEMONSTRATIONS) -> None:
    """A random model, and the right clicks on screens of the training tasks, and on others that say when to stop.

    The latter's buttons have shapes that neither training tasks nor held-out ones have.
    """
    from lit_rl.agents.codecs import Compact
    from lit_rl.agents.demonstrations import demonstrate, write_rows
    from lit_rl.agents.episodes import Manner
    from lit_rl.agents.play import Episodes
    from lit_rl.envs.tasks import read_tasks
    from lit_rl.envs.tiny_desktop import TinyDesktops
    from lit_rl.miniatures.vlm import build_vlm
    from lit_rl.policies.vision_language import VisionLanguageModel

    model = build_vlm(out / "model", family="qwen3_vl", characters="\n", words=WORDS, max_side=SIZE, patch_spread=0.02, seed=seed)
    episodes = Episodes(worlds=TinyDesktops(size=SIZE), codec=Compact(space="bins:3", prompt=False), manner=Manner(history=0))
    train = read_tasks(TASKS / "buttons_train.jsonl")
    others = [replace(task, params={**task.params, "first_shape": OTHER_SHAPES}) for task in train]
    (out / "data").mkdir()
    try:
        for name, tasks in {"train": train * (demonstrations // len(train)), "val": others}.items():
            write_rows(demonstrate(VisionLanguageModel(str(model)), episodes, tasks, seed=seed), out / f"data/{name}.jsonl")
    finally:
        episodes.close()


class Summary(Reached):
    """The content of summary.json."""

    episodes_trained: int


def summarize(
    before: float, curves: Mapping[str, Curve], played: Sequence[Mapping[str, object]], *, seconds: Mapping[str, float], seed: int
) -> Summary:
    """The content of summary.json; accuracy is the share of sampled episodes of held-out tasks that succeed."""
    played_in_training = sum(row["stage"] == "train" for row in played)
    return {**reached(before, curves[ACCURACY].values[-1], seconds=seconds, seed=seed), "episodes_trained": played_in_training}


def films(folder: Path) -> Picture:
    """The first film strips of the last evaluation in a folder, one below the other."""
    from PIL import Image

    last = max(folder.glob("eval-*.png")).name.rpartition("-")[0]
    strips = [Image.open(file).convert("RGB") for file in sorted(folder.glob(f"{last}-*.png"))[:SHOWN]]
    sheet = Image.new("RGB", (max(strip.width for strip in strips), sum(strip.height for strip in strips)), "white")
    for i, strip in enumerate(strips):
        sheet.paste(strip, (0, sum(above.height for above in strips[:i])))
    return sheet


def draw(file: Path, title: str, before: float, curves: Mapping[str, Curve], sheets: Sequence[Picture]) -> None:
    """One PNG: success over the optimizer steps, and film strips of the same held-out tasks before and after."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    ratios, high = [0.7, *(sheet.width / sheet.height for sheet in sheets)], 7.0
    figure, (left, *others) = plt.subplots(1, len(ratios), figsize=(high * sum(ratios), high), width_ratios=ratios, layout="constrained")
    accuracy = curves[ACCURACY]
    plot(left, before, accuracy, curves["success"], names=("held-out tasks", "training tasks (of the iteration)"))
    left.set(xlabel="optimizer steps", ylabel="sampled episodes that succeed", ylim=(0, 1.03), title=title)
    for axis, sheet, stage, done in zip(others, sheets, ("fine-tuning", "RL"), (before, accuracy.values[-1]), strict=True):
        axis.imshow(sheet)
        axis.set(title=f"after {stage}: {done:.0%} of held-out tasks")
        axis.axis("off")
    figure.savefig(file, dpi=130)


if __name__ == "__main__":
    main()
