"""The stochastic steps of a denoising path, which are those trained. Never empty; the same on every rank for the same arguments."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from functools import partial
from typing import Literal

import numpy as np
import torch

MixStrategy = Literal["progressive", "random", "decay", "exp_decay"]


def full_window(num_steps: int, *, fraction: float = 0.99) -> range:
    """The first int(N fraction) steps. Flow-GRPO's 0.99 leaves out the last one."""
    if num_steps < 1 or not 0 < fraction <= 1:
        raise ValueError(f"a window needs num_steps >= 1 and a fraction in (0, 1], got {num_steps} and {fraction}")
    return range(max(1, int(num_steps * fraction)))


def random_window(*, size: int, low: int, high: int, rng: random.Random) -> range:
    """`size` steps in a row out of low ... high - 1, every position equally likely: Flow-GRPO-Fast (3 steps of the first half)."""
    if size < 1 or low < 0 or high - low < size:
        raise ValueError(
            f"a window of {size} steps does not fit into steps {low} ... {high - 1}; set size in [1, {high - low}] or widen the range"
        )
    first = rng.randint(low, high - size)
    return range(first, first + size)


def random_steps(num_steps: int, *, fraction: float, rng: random.Random, last: bool = False) -> list[int]:
    """max(1, int(N fraction)) steps of all N, or of all but the last, rising: DeepGen-RL (30 of the first 49).

    The authors' trainer stops where it is to draw N of N - 1; here N - 1 are all there are.
    """
    if num_steps < 1 or not 0 < fraction <= 1:
        raise ValueError(f"steps need num_steps >= 1 and a fraction in (0, 1], got {num_steps} and {fraction}")
    candidates = range(num_steps if last else max(1, num_steps - 1))
    return sorted(rng.sample(candidates, min(len(candidates), max(1, int(num_steps * fraction)))))


def mix_window(
    iteration: int,
    *,
    num_steps: int,
    size: int = 4,
    iterations_per_window: int = 25,
    strategy: MixStrategy = "progressive",
    overlap: bool = True,
    overlap_step: int = 1,
    roll_back: bool = True,
    seed: int = 0,
    decay_from: int = 13,
    decay_rate: float = 0.1,
) -> range:
    """MixGRPO's sliding window [c, min(c + size, M)) over the first M = N - 2 steps (arXiv 2507.21802), as a function of the iteration.

    - progressive: c moves by overlap_step, or by size without overlap, every `iterations_per_window` iterations; past M it starts again
      (roll_back) or stays
    - decay: as progressive, but the time spent at c falls linearly to a quarter of iterations_per_window at c = M
    - exp_decay: ... falls as exp(-decay_rate max(0, c - decay_from))
    - random: c is uniform, from numpy's default_rng(seed + iteration - 1); iteration 0 begins at 0

    Published code reaches c = M, where nothing is left to train; here the window then stays where it last was.
    """
    steps = max(1, num_steps - 2)
    if size < 1 or iterations_per_window < 1 or overlap_step < 1 or iteration < 0:
        raise ValueError(
            f"size ({size}), iterations_per_window ({iterations_per_window}) and overlap_step ({overlap_step}) must be at least 1, "
            f"iteration ({iteration}) at least 0"
        )
    size = min(size, steps)
    if strategy == "random":
        first = int(np.random.default_rng(seed + iteration - 1).integers(0, steps - size + 1)) if iteration else 0
        return range(first, first + size)

    stay = partial(_stay, strategy=strategy, iterations=iterations_per_window, steps=steps, decay_from=decay_from, decay_rate=decay_rate)
    positions = range(0, steps + 1, overlap_step if overlap else size)
    if roll_back:
        iteration %= sum(stay(p) for p in positions)
    trainable = [p for p in positions if p < steps]
    for first in trainable:
        iteration -= stay(first)
        if iteration < 0:
            break
    return range(first, min(first + size, steps))


def _stay(position: int, *, strategy: MixStrategy, iterations: int, steps: int, decay_from: int, decay_rate: float) -> int:
    """Iterations that `mix_window` stays at a position."""
    if strategy == "decay":
        last = max(1, iterations // 4)
        return max(last, int(iterations * (1 - position / steps) + last * (position / steps)))
    if strategy == "exp_decay":
        return math.ceil(iterations * math.exp(-decay_rate * max(0, position - decay_from)))
    return iterations


def random_subset(candidates: Sequence[int], *, count: int, generator: torch.Generator) -> list[int]:
    """`count` of the candidate steps in random order, by `torch.randperm`: Flow-Factory's SDE steps, DanceGRPO's trained steps (60 %)."""
    if not 1 <= count <= len(candidates):
        raise ValueError(f"{count} steps cannot be drawn from {len(candidates)} candidates; set count in [1, {len(candidates)}]")
    order = torch.randperm(len(candidates), generator=generator)[:count]
    return [candidates[i] for i in order.tolist()]
