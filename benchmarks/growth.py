"""How time and memory grow with the group, the prompts, the kept latents and the length of answers, beside a peer of the same size.

    python -m benchmarks.growth [--case group rows latents length] [--iterations 12]

`group`, `rows` and `latents` are iterations of Flow-GRPO on a policy that computes next to nothing beside the bare loop of torch of
`benchmarks.overhead`: 4 prompts x G samples; P prompts x 4 samples; 4 x 4 samples of N steps, all of which but one are kept. `length` is
`NativeEngine` beside `generate` of transformers, 32 answers of L tokens, as in `benchmarks.generation`. Prints the median CPU seconds of
each size, the ratio to the peer, and how much more the largest size costs than the smallest one, over how much larger it is: 1.0 is linear
growth, less is what does not grow. Memory is what the data of an iteration hold, to the byte: a `FlowRollout`, over its latents and
log-probabilities alone; or keys and values, over those of answers that all keep their prompt themselves.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.generation import Arms, Case, measure
from benchmarks.overhead import SHAPE, SKIPPED, Work, beside_bare
from lit_rl.modules.base import LitRL
from lit_rl.rollouts.cache import Cache
from lit_rl.rollouts.decoder import Decoder
from lit_rl.types import FlowRollout


@dataclass(frozen=True)
class Point:
    """One size: CPU seconds of ours and of the peer, bytes of our data and of the numbers that they have to hold."""

    size: int
    ours: float
    peer: float
    held: int
    needed: int


def held_bytes(rollout: FlowRollout) -> int:
    """Bytes of all tensors of a rollout, each storage once."""
    values = [getattr(rollout, field.name) for field in fields(rollout)]
    entries = [part for value in values for part in (value.values() if isinstance(value, Mapping) else [value])]
    tensors = [part for part in entries if isinstance(part, Tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def flow(work: Work, size: int, iterations: int) -> Point:
    """Iterations of this work."""
    held: list[int] = []
    iterate = LitRL.iterate

    def watched(method: LitRL[FlowRollout]) -> FlowRollout:
        rollout = iterate(method)
        held.append(held_bytes(rollout))
        return rollout

    LitRL.iterate = watched  # type: ignore[assignment, method-assign]
    try:
        with tempfile.TemporaryDirectory() as logs:
            seconds = beside_bare(work, iterations, Path(logs))
    finally:
        LitRL.iterate = iterate  # type: ignore[method-assign]
    ours, bare = (statistics.median(seconds[arm][SKIPPED:]) for arm in ("ours", "bare"))
    samples, numbers = work.prompts * work.group, torch.Size(SHAPE).numel()
    return Point(size, ours, bare, held[-1], 4 * samples * (work.steps * numbers + work.steps - 1))


def length(case: Case, iterations: int) -> Point:
    """Answers of this length."""
    caches: list[Cache] = []
    make = Decoder.cache

    def watched(decoder: Decoder, **sizes: int) -> Cache:
        caches.append(make(decoder, **sizes))
        return caches[-1]

    with tempfile.TemporaryDirectory() as folder:
        arms = Arms(case, Path(folder))
        Decoder.cache = watched  # type: ignore[assignment, method-assign]
        try:
            rounds = measure({"native": arms.native, "generate": arms.generate}, iterations)
        finally:
            Decoder.cache = make  # type: ignore[method-assign]
        ours, theirs = (statistics.median(taken[1] for taken in rounds[arm]) for arm in ("native", "generate"))
        cache = caches[-1]
        token = cache.own.shape[0] * 2 * cache.own.shape[3] * cache.own.shape[5] * cache.own.element_size()
    answers = case.prompts * case.group
    needed = answers * (case.prompt_lengths[1] + case.new_tokens - 1) * token  # of siblings that do not share their prompt
    return Point(case.new_tokens, ours, theirs, cache.own.nbytes + cache.prompts.nbytes, needed)


SIZES = {"group": (4, 16, 64, 256), "rows": (4, 16, 64, 256), "latents": (6, 12, 24, 48), "length": (32, 64, 128, 256)}
NAMES = {"group": "samples of each of 4 prompts", "rows": "prompts x 4 samples", "latents": "steps of 4 x 4 samples", "length": "tokens"}
ANSWERS = Case(vocab=1024, prompts=4, group=8, prompt_lengths=(32, 32), new_tokens=32, stops=0)
CASES: Mapping[str, Callable[[int, int], Point]] = {
    "group": lambda size, iterations: flow(Work(2, group=size), size, iterations),
    "rows": lambda size, iterations: flow(Work(2, prompts=size), size, iterations),
    "latents": lambda size, iterations: flow(Work(2, steps=size), size, iterations),
    "length": lambda size, iterations: length(replace(ANSWERS, new_tokens=size), max(1, iterations // 6)),
}


def report(case: str, points: Sequence[Point]) -> str:
    """The table of a case."""
    lines = [f"| {NAMES[case]} | ours | peer | ours / peer | held / needed |", "| --- | --- | --- | --- | --- |"]
    for p in points:
        lines.append(f"| {p.size} | {p.ours:.4f} s | {p.peer:.4f} s | {p.ours / p.peer:.2f} | {p.held / p.needed:.2f} |")
    first, last = points[0], points[-1]
    larger = last.size / first.size
    ours, peer, held = (getattr(last, name) / getattr(first, name) / larger for name in ("ours", "peer", "held"))
    return "\n".join([*lines, f"| growth / {larger:.0f} | {ours:.2f} | {peer:.2f} | | {held:.2f} |"])


def main(arguments: Sequence[str] | None = None, sizes: Mapping[str, Sequence[int]] = SIZES) -> str:
    """Print and return the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--iterations", type=int, default=12, help="timed iterations of each size; of answers a sixth of that")
    args = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    torch.set_num_threads(1)
    tables = []
    for case in args.case:
        tables.append(report(case, [CASES[case](size, args.iterations) for size in sizes[case]]))
        print(tables[-1], flush=True)
    return "\n".join(tables)


if __name__ == "__main__":
    main()
