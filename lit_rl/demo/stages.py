"""Two stages: fine-tuning, which is kept between demos of the same seed, and a method that goes on from there."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from lit_rl.demo.commands import say
from lit_rl.demo.curves import Curve, Stages

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Reached(TypedDict):
    """The part of summary.json that all these demos have."""

    held_out_accuracy: Stages
    seconds: dict[str, float]
    seed: int


def arguments(doc: str | None, methods: Iterable[str]) -> argparse.Namespace:
    """`method`, by default the first one, and `seed` of the command line. doc: Its first line describes the command."""
    first, *others = methods
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--method", choices=[first, *others], default=first)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def kept(out: Path, seed: int, fine_tune: Callable[[], float]) -> float:
    """Seconds of the fine-tuning in this folder, by the last demo if that had the same seed, else by `fine_tune` in an empty folder."""
    known = out / "sft.json"
    if known.is_file() and (before := json.loads(known.read_text()))["seed"] == seed:
        say(f"the fine-tuned model of the last demo is kept in {out}/")
        return float(before["seconds"])
    if out.exists():
        say(f"removing the previous demo in {out}/")
        shutil.rmtree(out)
    seconds = fine_tune()
    known.write_text(json.dumps({"seed": seed, "seconds": seconds}) + "\n")
    return seconds


def exported(run: Path) -> Path:
    """The folder of the model that a run wrote last."""
    return max((run / "export").glob("iteration-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))


def reached(before: float, after: float, *, seconds: Mapping[str, float], seed: int) -> Reached:
    """Rounded numbers of summary.json. before, after: Held-out accuracy after the fine-tuning and after the method."""
    return {
        "held_out_accuracy": {"after_warmup": round(before, 4), "after_rl": round(after, 4)},
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "seed": seed,
    }


def plot(axis: Axes, before: float, held_out: Curve, trained: Curve | None, *, names: tuple[str, str]) -> None:
    """Held-out accuracy over optimizer steps, from the fine-tuned model on, and what the method trains on. names: Of both lines."""
    if trained is not None:
        axis.plot(trained.steps, trained.values, color="#9aa5b1", label=names[1])
    axis.plot([0, *held_out.steps], [before, *held_out.values], "o-", color="#1f6feb", label=names[0])
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right")
