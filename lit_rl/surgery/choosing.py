"""The best of several checkpoints by a metric of its evaluation."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeVar

from lit_rl.checkpoints.reading import content
from lit_rl.errors import ConfigError, listed

T = TypeVar("T")
Mode = Literal["max", "min"]


def logged_metrics(checkpoint: Path) -> dict[str, float]:
    """The last value of every metric that a run had logged when it wrote a checkpoint, which may be a folder."""
    ranks = content(checkpoint).get("logged", {}).get("ranks") or [{}]
    return {name: float(value) for name, value in ranks[0].get("callback_metrics", {}).items()}


def best(results: Mapping[T, Mapping[str, float]], metric: str, *, mode: Mode = "max", top: int = 1) -> list[T]:
    """The `top` keys with the highest ("max") or lowest values of a metric, the best first; of equal ones the earlier.

    Keys whose metric is missing or NaN are passed over. Raises ConfigError where none has a value, with the nearest name, or fewer than
    `top` have one.
    """
    if mode not in ("max", "min"):
        raise ConfigError(f"mode {mode!r} must be max or min")
    if top < 1:
        raise ConfigError(f"top {top} must be at least 1")
    found = {key: values[metric] for key, values in results.items() if not math.isnan(values.get(metric, math.nan))}
    if not found:
        names = sorted({name for values in results.values() for name in values})
        near = difflib.get_close_matches(metric, names, n=1)
        there = f"did you mean {near[0]}?" if near else f"there are {listed(names, shown=20)}" if names else "they hold no results at all"
        raise ConfigError(f"metric {metric!r} has a value in none of the {len(results)} checkpoints: {there}")
    if len(found) < top:
        raise ConfigError(f"metric {metric!r} has a value in {len(found)} of {len(results)} checkpoints, and the best {top} are asked for")
    return sorted(found, key=lambda key: found[key], reverse=mode == "max")[:top]


def best_checkpoints(checkpoints: Sequence[Path], metric: str, *, mode: Mode = "max", top: int = 1) -> dict[Path, float]:
    """The best of files, with their values. A folder of checkpoints stands for those in it."""
    places = [place for one in checkpoints for place in ([one] if one.suffix == ".ckpt" else sorted(one.glob("*.ckpt")))]
    if not places:
        raise ConfigError(f"no checkpoint (*.ckpt) is in {listed([str(one) for one in checkpoints])}")
    results = {place: logged_metrics(place) for place in places if not place.is_symlink()}
    return {place: results[place][metric] for place in best(results, metric, mode=mode, top=top)}
