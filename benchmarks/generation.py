"""Our generation engine beside `generate` of transformers as TRL calls it, on the same weights and prompts.

    python benchmarks/generation.py [--case small large long ragged] [--repeats 5]

The other arm is `generate` with sampling over a batch padded on the left, in which siblings are rows of their own: TRL's `GRPOTrainer`
without vLLM. Log-probabilities, which ours reports, it does not compute. In `small`, `large` and `long` (64 rows of 512 tokens) no token
ends an answer; in `ragged` prompts differ in length and one token in about fifty ends one. Arms take turns within one process, the first
round is skipped. Prints medians of the clock and of this process's CPU seconds, answers per second, the ratios, and what a call adds to a
process's peak memory.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_rl.miniatures.lm import build_lm
from lit_rl.policies.causal_lm import CausalLM
from lit_rl.rollouts.base import Request, Sampling
from lit_rl.rollouts.native import NativeEngine


@dataclass(frozen=True)
class Case:
    """Random prompts, each for `group` answers, by a Qwen2 of random weights."""

    vocab: int
    prompts: int
    group: int
    prompt_lengths: tuple[int, int]  # from, to
    new_tokens: int
    stops: int  # tokens that end an answer
    hidden: int = 128
    layers: int = 4


CASES = {
    "small": Case(vocab=1024, prompts=1, group=8, prompt_lengths=(32, 32), new_tokens=96, stops=0),
    "large": Case(vocab=32768, prompts=1, group=8, prompt_lengths=(32, 32), new_tokens=96, stops=0),
    "long": Case(vocab=1024, prompts=8, group=8, prompt_lengths=(32, 32), new_tokens=512, stops=0),
    "ragged": Case(vocab=1024, prompts=8, group=8, prompt_lengths=(16, 64), new_tokens=96, stops=20),
}


class Arms:
    """Both ways to answer the same requests; each returns the number of drawn tokens."""

    def __init__(self, case: Case, folder: Path) -> None:
        build_lm(folder, vocab_size=case.vocab, hidden=case.hidden, layers=case.layers)
        self.case, self.calls = case, 0
        self.policy = CausalLM(str(folder))
        self.policy.load()
        self.policy.eval()
        self.stops = list(range(case.stops))
        self.policy.stop_ids = self.stops  # type: ignore[assignment]
        self.engine = NativeEngine()
        self.engine.setup(self.policy, rank=0, world_size=1)
        self.lm: Any = self.policy.network.lm
        self.lm.generation_config.eos_token_id = self.stops or None
        lengths = torch.linspace(*case.prompt_lengths, case.prompts).long().tolist()
        drawn = torch.Generator().manual_seed(0)
        different = [torch.randint(case.stops, case.vocab, (n,), generator=drawn).tolist() for n in lengths]
        self.prompts = [prompt for prompt in different for _ in range(case.group)]

    def native(self) -> int:
        self.calls += 1
        requests = [Request(prompt, (self.calls, i)) for i, prompt in enumerate(self.prompts)]
        samples = self.engine.generate(requests, Sampling(max_new_tokens=self.case.new_tokens))
        return sum(len(sample.ids) for sample in samples)

    @torch.no_grad()
    def generate(self) -> int:
        from transformers import GenerationConfig

        width = max(map(len, self.prompts))
        ids, mask = torch.zeros(2, len(self.prompts), width, dtype=torch.long)
        for row, prompt in enumerate(self.prompts):
            ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = torch.tensor(prompt), 1
        settings = GenerationConfig(
            max_new_tokens=self.case.new_tokens, do_sample=True, temperature=1.0, top_p=1.0, top_k=0, pad_token_id=0,
            eos_token_id=self.stops or None,
        )  # fmt: skip
        answers = self.lm.generate(ids, attention_mask=mask, generation_config=settings)[:, width:]
        return int(self.drawn(answers).sum())

    def drawn(self, answers: Tensor) -> Tensor:
        """Tokens of each row up to and with the first that ends it."""
        stopped = torch.isin(answers, torch.tensor(self.stops, dtype=torch.long)).long()
        return (stopped.cumsum(1) - stopped == 0).sum(1)


def measure(arms: Mapping[str, Callable[[], int]], repeats: int) -> dict[str, list[tuple[float, float, int]]]:
    """(clock, CPU seconds, tokens) of each arm's rounds."""
    rounds: dict[str, list[tuple[float, float, int]]] = {name: [] for name in arms}
    for _ in range(1 + repeats):
        for name, run in arms.items():
            clock, cpu = time.perf_counter(), time.process_time()
            tokens = run()
            rounds[name].append((time.perf_counter() - clock, time.process_time() - cpu, tokens))
    return {name: taken[1:] for name, taken in rounds.items()}


def memory(case: str, arm: str) -> float:
    """`growth` of an arm in a fresh process."""
    command = [sys.executable, __file__, "--case", case, "--memory", arm]
    root = Path(__file__).parents[1]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}).stdout
    return float(out.split()[-1])


def growth(run: Callable[[], int]) -> float:
    """MiB by which two calls raise the peak of this process's memory above what it has now. Linux only."""
    status = Path("/proc/self/status")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _kibibytes(status, "VmRSS")
    run()
    run()
    return (_kibibytes(status, "VmHWM") - before) / 1024


def _kibibytes(status: Path, name: str) -> int:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name))


def report(name: str, case: Case, rounds: Mapping[str, Sequence[tuple[float, float, int]]], added: Mapping[str, float]) -> str:
    answers = case.prompts * case.group
    lines = [
        f"{name}: {case.prompts} prompts x {case.group}, {case.prompt_lengths[0]} to {case.prompt_lengths[1]} + {case.new_tokens} tokens, "
        f"vocabulary {case.vocab}; medians of {len(next(iter(rounds.values())))} rounds",
        f"{'':12} {'clock':>8} {'CPU':>8} {'answers/s':>10} {'tokens/CPU s':>12} {'memory':>9}",
    ]
    medians = {}
    for arm, taken in rounds.items():
        clock, cpu = (statistics.median(t[i] for t in taken) for i in (0, 1))
        medians[arm] = clock, cpu
        rate = sum(t[2] for t in taken) / sum(t[1] for t in taken)
        extra = f"{added[arm]:5.0f} MiB" if arm in added else "-"
        lines.append(f"{arm:12} {clock:6.3f} s {cpu:6.3f} s {answers / clock:10.1f} {rate:12.0f} {extra:>9}")
    lines += [f"drawn by {arm} in a round {statistics.median(t[2] for t in taken):.0f}" for arm, taken in rounds.items()]
    clock, cpu = (medians["generate"][i] / medians["native"][i] for i in (0, 1))
    lines.append(f"times the answers/s {clock:.2f}, by CPU seconds {cpu:.2f} (ours / generate)")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None, cases: Mapping[str, Case] = CASES) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=cases, default=list(cases))
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds of each arm")
    parser.add_argument("--no-memory", action="store_true", help="do not start a process per arm to measure memory in")
    parser.add_argument("--memory", choices=["native", "generate"], help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    tables = []
    for name in args.case:
        with tempfile.TemporaryDirectory() as folder:
            arms = Arms(cases[name], Path(folder))
            if args.memory:
                return _print(f"{growth(getattr(arms, args.memory)):.1f}")
            rounds = measure({"native": arms.native, "generate": arms.generate}, args.repeats)
        added = {} if args.no_memory else {arm: memory(name, arm) for arm in rounds}
        tables.append(_print(report(name, cases[name], rounds, added)))
    return "\n".join(tables)


def _print(text: str) -> str:
    print(text, flush=True)
    return text


if __name__ == "__main__":
    main()
