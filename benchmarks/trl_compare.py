"""Our SFT, DPO and GRPO beside TRL's trainers and `transformers.Trainer`: the same model, batches and settings, in turns on one core.

    python -m pip install --no-deps --target FOLDER trl==1.16.0
    python -m benchmarks.trl_compare --trl FOLDER [--case sft-32k ...] [--side ours trl transformers] [--turns 5] [--size 2]

Each side is a process of its own with one thread; all are pinned to the same core, and while one makes a turn of steps the others wait.
Ours is the shipped path: Lightning's Trainer, the method, the datamodule that reads text files, one optimizer step per iteration. Theirs
run with bf16 and gradient checkpointing off. `transformers.Trainer` takes part in SFT alone, with rows that are tokenized before; TRL's
own loss is a fallback for CPUs at 32768 words, so there `transformers` is the peer to look at. AdamW, constant rate, gradients clipped at
norm 1, float32. In GRPO no token ends an answer, rewards alternate, there is no reference. Prints per step medians of CPU seconds and of
the clock, the growth of peak memory over what a process has when its model is loaded, and the ratios. It fails where the sides have not
trained equally many tokens in every step, or, in SFT and DPO, where their losses differ in any step: after the first one, losses agree
only if the updates do. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.trl_sides import SIDES, Case, command
from lit_rl.miniatures.lm import build_lm

ROOT = Path(__file__).parents[1]
TOLERANCE = 1e-4  # of losses

CASES = {
    f"{name}-{label}": Case(vocab=vocab, **sizes)
    for label, vocab in (("1k", 1024), ("32k", 32768))
    for name, sizes in {
        "sft": {"method": "sft", "rows": 8, "prompt": 1, "answer": 127},
        "sft-half": {"method": "sft", "rows": 8, "prompt": 64, "answer": 64},
        "dpo": {"method": "dpo", "rows": 4, "prompt": 64, "answer": 64},
        "grpo": {"method": "grpo", "rows": 8, "prompt": 32, "answer": 96},
    }.items()
}


class Side:
    """A process that trains, turn by turn."""

    def __init__(self, name: str, case: Case, folder: Path, *, turns: int, size: int, core: int, packages: str | None) -> None:
        self.name = name
        paths = [str(ROOT), *([packages] if packages and name == "trl" else [])]
        quiet = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        self.log = (folder / f"{name}.log").open("w+")
        self.process = subprocess.Popen(
            command(name, case, folder, turns=turns, size=size, core=core),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, cwd=ROOT,
            env=os.environ | quiet | {"PYTHONPATH": os.pathsep.join(paths)},
        )  # fmt: skip
        self.hear("ready")

    def turn(self) -> dict[str, float]:
        """Seconds per step of the next turn."""
        self._go()
        return self.hear("turn")

    def end(self) -> dict[str, Any]:
        self._go()
        end = self.hear("end")
        self.process.communicate()
        return end

    def hear(self, what: str) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise SystemExit(f"{self.name} ended before its {what}:\n{self.log.read()[-4000:]}")
        return json.loads(line)[what]

    def _go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()


def measure(case: Case, sides: Sequence[str], *, turns: int, size: int, core: int, packages: str | None) -> dict[str, dict[str, Any]]:
    """By side: medians of `clock` and `cpu` per step, `growth` in bytes, `losses` and `tokens` of every step."""
    with tempfile.TemporaryDirectory() as folder:
        build_lm(folder, vocab_size=case.vocab, hidden=case.hidden, layers=case.layers, tied=True, chat=False)
        # One after the other: two at a time would share the core.
        running = [Side(name, case, Path(folder), turns=1 + turns, size=size, core=core, packages=packages) for name in sides]
        taken = [[side.turn() for side in running] for _ in range(1 + turns)][1:]
        found = {}
        for i, side in enumerate(running):
            seconds = {clock: statistics.median(turn[i][clock] for turn in taken) for clock in ("clock", "cpu")}
            found[side.name] = seconds | side.end()
    return found


def check(case: Case, found: Mapping[str, Mapping[str, Any]]) -> float:
    """The largest difference between the sides' losses of a step. Raises where they have not done the same work."""
    for side, got in found.items():
        if set(got["tokens"]) != {case.tokens}:
            raise SystemExit(f"{side} trained {got['tokens']} tokens in its steps, not {case.tokens} in each")
    away = max(max(losses) - min(losses) for losses in zip(*(got["losses"] for got in found.values()), strict=True))
    if case.method != "grpo" and away > TOLERANCE:  # which draws its own answers on either side
        raise SystemExit(f"the losses differ by up to {away:.1e}: " + ", ".join(f"{side} {got['losses']}" for side, got in found.items()))
    return away


def report(name: str, case: Case, found: Mapping[str, Mapping[str, Any]]) -> str:
    away = check(case, found)
    losses = next(iter(found.values()))["losses"]
    lines = [f"{name}: {len(losses)} steps, each of {case.tokens} trained tokens"]
    if case.method != "grpo":
        lines[0] += f"; losses, {losses[0]:.4f} in the first step and {losses[-1]:.4f} in the last, differ by at most {away:.0e}"
    for side, got in found.items():
        rate = case.tokens / got["cpu"]
        lines.append(f"  {side:20}{got['cpu']:8.3f} s CPU{got['clock']:8.3f} s{got['growth'] / 2**20:8.0f} MiB{rate:8.0f} tokens/CPU s")
    for peer in [side for side in found if side != "ours" and "ours" in found]:
        ratio = {what: found["ours"][what] / found[peer][what] for what in ("cpu", "clock", "growth")}
        lines.append(f"  ours / {peer:13}{ratio['cpu']:8.2f}      {ratio['clock']:8.2f}  {ratio['growth']:8.2f}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None, cases: Mapping[str, Case] = CASES) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=cases, default=list(cases))
    parser.add_argument("--side", nargs="+", choices=list(SIDES), default=list(SIDES))
    parser.add_argument("--turns", type=int, default=5, help="timed turns of each side")
    parser.add_argument("--size", type=int, default=2, help="steps of a turn")
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)))
    parser.add_argument("--trl", help="folder that trl is installed in; default: the environment")
    args = parser.parse_args(arguments)
    tables = []
    for name in args.case:
        sides = [side for side in args.side if side != "transformers" or cases[name].method == "sft"]
        found = measure(cases[name], sides, turns=args.turns, size=args.size, core=args.core, packages=args.trl)
        tables.append(report(name, cases[name], found))
        print(tables[-1], flush=True)
    return "\n".join(tables)


if __name__ == "__main__":
    main()
