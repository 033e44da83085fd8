"""The curves that the demo's runs logged, and their summary."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Literal, TypedDict

ACCURACY = "val/ocr_similarity_perfect"

Known = dict[str, dict[str, list[list[float]]]]
"""By method and seed: images, and accuracy after them."""


Stage = Literal["after_warmup", "after_rl"]


class Stages(TypedDict):
    """A held-out number after the supervised warm-up and after reinforcement learning."""

    after_warmup: float
    after_rl: float


@dataclass(frozen=True)
class Curve:
    """One logged number over the optimizer steps."""

    steps: list[int]
    values: list[float]


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


def held_out(curves: Mapping[str, Curve], scores: Mapping[str, str]) -> dict[str, Stages]:
    """First and last value of held-out numbers. scores: their tags by their name in summary.json."""
    values = {name: curves[tag].values for name, tag in scores.items()}
    return {name: {"after_warmup": round(found[0], 4), "after_rl": round(found[-1], 4)} for name, found in values.items()}


def summarize(curves: Mapping[str, Curve], scores: Mapping[str, str], *, seconds: Mapping[str, float], seed: int) -> dict[str, object]:
    """The content of summary.json. scores: tags of held-out numbers by their name in it.

    Accuracy is the share of evaluation images whose text the OCR engine reads exactly as prompted.
    """
    return {
        **held_out(curves, scores),
        "images_trained": sum(round(n) for n in curves["images"].values),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "seed": seed,
    }


def remember(file: Path, method: str, seed: int, curves: Mapping[str, Curve], *, tag: str = ACCURACY) -> Known:
    """Accuracy over images of every run of a demo so far, this one included; `file` keeps them."""
    known: Known = json.loads(file.read_text()) if file.is_file() else {}
    known.setdefault(method, {})[str(seed)] = list(over_images(curves, tag))
    file.write_text(json.dumps(known, indent=2) + "\n")
    return known


def images_seen(curves: Mapping[str, Curve]) -> list[float]:
    """Images before the first iteration, and after each."""
    return [0.0, *accumulate(curves["images"].values)]


def over_images(curves: Mapping[str, Curve], tag: str) -> tuple[list[float], list[float]]:
    """A held-out number, and how many images each evaluation came after; the warm-up's came after none."""
    seen, steps, values = images_seen(curves), curves["images"].steps, curves[tag]
    return [seen[sum(step <= at for step in steps)] for at in values.steps], values.values
