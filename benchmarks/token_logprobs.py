"""Log-probabilities of tokens from hidden states: ours beside the plain way (all logits, log_softmax, gather), forward and backward.

    python benchmarks/token_logprobs.py [--tokens 1024] [--vocabulary 32768] [--hidden 128] [--repeats 5]

Prints, for a trained and a frozen head (LoRA), with and without entropy, seconds and the growth of peak memory of both ways and their
ratios. Seconds are medians of CPU seconds of this process, the two ways taking turns (on a GPU: of the clock, when the device is done).
Memory is how far the high-water mark of a fresh process rises above what the inputs need (on a GPU: of the allocator). Both ways must
give the same gradients.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_rl.losses.token_logprobs import token_logprobs

TOLERANCE = 1e-4  # of the gradients, relative to the largest


@dataclass(frozen=True)
class Case:
    tokens: int
    vocabulary: int
    hidden: int
    frozen: bool
    entropy: bool

    def __str__(self) -> str:
        return f"{'frozen' if self.frozen else 'trained'} head{', entropy' if self.entropy else ''}"

    def inputs(self, tokens: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """hidden, weight, targets."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        g = torch.Generator().manual_seed(0)
        hidden = torch.randn(tokens or self.tokens, self.hidden, generator=g).to(device).requires_grad_()
        weight = (torch.randn(self.vocabulary, self.hidden, generator=g) * self.hidden**-0.5).to(device).requires_grad_(not self.frozen)
        return hidden, weight, torch.randint(self.vocabulary, (len(hidden),), generator=g).to(device)


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool) -> Tensor:
    logp = F.linear(hidden, weight).float().log_softmax(-1)
    total = logp.gather(1, targets[:, None]).sum()
    return total - 0.01 * (logp.exp() * logp).sum() if entropy else total


def ours(hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool) -> Tensor:
    got = token_logprobs(hidden, weight, targets, entropy=entropy)
    return got.logprobs.sum() + (0.01 * got.entropy.sum() if got.entropy is not None else 0)


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor, bool], Tensor]] = {"plain": plain, "ours": ours}


def seconds(way: str, case: Case, inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[float, list[Tensor]]:
    learned = [t for t in inputs[:2] if t.requires_grad]
    clock = time.perf_counter if inputs[0].is_cuda else time.process_time
    start = clock()
    gradients = torch.autograd.grad(WAYS[way](*inputs, case.entropy), learned)
    if inputs[0].is_cuda:
        torch.cuda.synchronize()
    return clock() - start, list(gradients)


def memory(way: str, case: Case) -> int:
    """Bytes above the inputs, in this process, which must be a fresh one."""
    torch.set_num_threads(1)
    seconds(way, case, case.inputs(tokens=1))
    inputs = case.inputs()
    if inputs[0].is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.max_memory_allocated()
        seconds(way, case, inputs)
        return torch.cuda.max_memory_allocated() - before
    before = high_water_mark()
    seconds(way, case, inputs)
    return high_water_mark() - before


def high_water_mark() -> int:
    """Bytes of memory that this process has ever held (Linux). Not `ru_maxrss`, which a child inherits from its parent."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return 1024 * int(line.split()[1])


def measure(case: Case, repeats: int) -> str:
    """One line of the table."""
    inputs = case.inputs()
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    found: dict[str, list[Tensor]] = {}
    for turn in range(repeats + 1):
        for way in WAYS:
            spent, found[way] = seconds(way, case, inputs)
            if turn:  # the first is the warm-up
                times[way].append(spent)
    for a, b in zip(found["plain"], found["ours"], strict=True):
        if (a - b).abs().max() > TOLERANCE * a.abs().max():
            raise SystemExit(f"{case}: the two ways did not give the same gradients")
    peak = {}
    for way in WAYS:  # a fresh process each: a high-water mark never falls
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peak[way] = pool.apply(memory, (way, case))
    median = {way: statistics.median(spent) for way, spent in times.items()}
    return (
        f"{case!s:24}{median['plain']:9.3f}{median['ours']:9.3f}{median['ours'] / median['plain']:9.2f}"
        f"{peak['plain'] / 2**20:9.0f}{peak['ours'] / 2**20:9.0f}{peak['ours'] / max(peak['plain'], 1):9.2f}"
    )


def main(arguments: Sequence[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    lines = [
        f"{args.tokens} tokens, vocabulary {args.vocabulary}, hidden {args.hidden}, float32",
        f"{'':24}{'seconds':>27}{'peak MiB':>27}",
        f"{'':24}{'plain':>9}{'ours':>9}{'ratio':>9}{'plain':>9}{'ours':>9}{'ratio':>9}",
    ]
    for frozen in (False, True):
        for entropy in (False, True):
            case = Case(args.tokens, args.vocabulary, args.hidden, frozen=frozen, entropy=entropy)
            lines.append(measure(case, args.repeats))
    table = "\n".join(lines)
    print(table)
    return table


if __name__ == "__main__":
    main()
