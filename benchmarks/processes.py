"""Two processes that train one model beside two single runs at once: what training together costs.

    python -m benchmarks.processes [--case flow language] [--iterations 12] [--rounds 3]

Both arms are two processes of one thread each and do the same work per process and iteration: a run of two processes (DDP over gloo) with
twice the prompts, or two runs of one process that know nothing of each other. So efficiency is the time of an iteration of the single runs
over that of the run of two: 1 where nothing is spent on talking and waiting. Arms take turns, each turn in new processes; the first
iterations are skipped. Prints medians by the clock, where the two cores have to be free for it to mean anything, and in CPU seconds of both
processes, which leave out waiting; and the seconds of an iteration that a process waits in collectives, by who calls them.

`flow`: Flow-GRPO on the demo's SD3 miniature, 4 prompts x 8 images per process, 4 steps, one optimizer step. `language`: GRPO on a Qwen2
of 2 layers and width 64, 4 prompts x 8 answers of up to 64 tokens per process, one token in 50 ending an answer, four optimizer steps.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from callbacks.reward_scoring import RewardScoring
from datamodules.base import PromptDataModule
from lit_rl.rewards.base import Reward
from lit_rl.types import Info

CASES = ("flow", "language")
PROMPTS, GROUP = 4, 8  # of each process
SKIPPED = 1
ROOT = Path(__file__).parents[1]


class Length(Reward):
    """Numbers that differ: the mean pixel of an image, or the length of a text."""

    outputs = ("length",)
    medium = None

    def score(self, media: Tensor | Sequence[str], info: Sequence[Info]) -> Mapping[str, Tensor]:
        if isinstance(media, Tensor):
            return {"length": media.flatten(1).double().mean(1)}
        return {"length": torch.tensor([float(len(text)) for text in media], dtype=torch.float64)}


class Clock(L.Callback):
    """Seconds of each iteration by the clock and of this process's CPU, and those in collectives by who calls them."""

    def __init__(self) -> None:
        self.clock: list[float] = []
        self.cpu: list[float] = []
        self.waited: Counter[str] = Counter()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.clock.append(time.perf_counter())
        self.cpu.append(time.process_time())
        if len(self.clock) == SKIPPED + 1:
            self.waited.clear()

    def listen(self) -> None:
        """Take the time of every collective from here on."""
        for name in ("all_reduce", "all_gather", "all_gather_object", "broadcast", "barrier", "scatter_object_list", "gather_object"):
            setattr(torch.distributed, name, self._timed(getattr(torch.distributed, name)))

    def _timed(self, collective: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = collective(*args, **kwargs)
            frames = [frame for frame in traceback.extract_stack() if str(ROOT) in frame.filename and "benchmarks" not in frame.filename]
            ours = [frame for frame in frames if ".venv" not in frame.filename and not frame.filename.endswith("ranks.py")]
            self.waited[f"{ours[-1].filename.split('/')[-1]}:{ours[-1].name}" if ours else "Lightning"] += time.perf_counter() - start
            return result

        return timed


def flow(folder: Path, world: int) -> tuple[L.LightningModule, L.LightningDataModule]:
    """Method and prompts of the case of this name."""
    from lit_rl.losses.step_surrogates import Clip
    from lit_rl.methods.flow_grpo import FlowGRPO
    from lit_rl.policies.sd3 import SD3Policy

    policy = SD3Policy(str(folder / "flow"), resolution=(16, 32), max_sequence_length=24)
    method = FlowGRPO(
        policy, prompts_per_iteration=PROMPTS * world, group_size=GROUP, num_steps=4, rollout_micro_batch=GROUP, train_micro_batch=32,
        surrogate=Clip(low=1e-4, high=1e-4),
    )  # fmt: skip
    return method, PromptDataModule([{"prompt": str(i)} for i in range(64)])


def language(folder: Path, world: int) -> tuple[L.LightningModule, L.LightningDataModule]:
    """Method and prompts of the case of this name."""
    from datamodules.prompts_text import TextPrompts
    from lit_rl.methods.grpo import GRPO
    from lit_rl.policies.causal_lm import CausalLM
    from lit_rl.rollouts.answers import Answers
    from lit_rl.rollouts.base import Sampling

    policy = CausalLM(str(folder / "language"))
    policy.stop_ids = list(range(10, 30))  # type: ignore[assignment]  # of 1024 tokens, drawn alike
    answers = Answers(sampling=Sampling(max_new_tokens=64), chunk=PROMPTS * GROUP)
    method = GRPO(policy, prompts_per_iteration=PROMPTS * world, group_size=GROUP, inner_epochs=4, answers=answers)
    return method, TextPrompts(train=str(folder / "rows.jsonl"))


def train(case: str, folder: Path, iterations: int) -> None:
    """Train as one process of those that the environment speaks of, and print what an iteration cost."""
    torch.set_num_threads(1)
    world, clock = int(os.environ.get("WORLD_SIZE", 1)), Clock()
    method, data = {"flow": flow, "language": language}[case](folder, world)
    trainer = L.Trainer(
        accelerator="cpu", devices=world, strategy="ddp" if world > 1 else "auto", max_epochs=SKIPPED + iterations + 1, logger=False,
        callbacks=[RewardScoring({"length": Length()}), clock], limit_val_batches=0, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    if world > 1:
        clock.listen()
    trainer.fit(method, data)
    spent = [[after - before for before, after in pairwise(times)][SKIPPED:] for times in (clock.clock, clock.cpu)]
    waited = {name: seconds / iterations for name, seconds in clock.waited.items()}
    print(json.dumps({"clock": spent[0], "cpu": spent[1], "waited": waited}))


def turn(case: str, folder: Path, iterations: int, *, together: bool) -> list[dict[str, Any]]:
    """The lines that both processes of an arm print."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = []
    for rank in map(str, range(2)):
        env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "LIT_RL_CACHE": ""}
        if together:
            env |= {
                "TORCHELASTIC_RUN_ID": "x",
                "WORLD_SIZE": "2",
                "LOCAL_WORLD_SIZE": "2",
                "RANK": rank,
                "LOCAL_RANK": rank,
                "GROUP_RANK": "0",
            }
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        words = [sys.executable, "-m", "benchmarks.processes", "--folder", str(folder), "--case", case, "--iterations", str(iterations)]
        started.append(subprocess.Popen(words, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True))
    said = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit(f"a process of {case} failed: run {' '.join(words)}")
    return [json.loads(text.splitlines()[-1]) for text in said]


def compare(case: str, folder: Path, *, iterations: int, rounds: int) -> str:
    """The line of a case, and where the run of two waits."""
    found: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for _ in range(rounds):
        for together, results in found.items():
            results += turn(case, folder, iterations, together=together)
    medians = {
        (together, what): statistics.median(number for result in results for number in result[what])
        for together, results in found.items()
        for what in ("clock", "cpu")
    }
    waits = Counter[str]()
    for result in found[True]:
        waits.update({name: seconds / len(found[True]) for name, seconds in result["waited"].items()})
    lines = [f"{case}: {what} {medians[False, what]:.3f} s alone, {medians[True, what]:.3f} s together, efficiency "
             f"{medians[False, what] / medians[True, what]:.2f}" for what in ("clock", "cpu")]  # fmt: skip
    return "\n".join([*lines, *(f"    waits {seconds:.4f} s in {name}" for name, seconds in waits.most_common(6))])


def prepare(folder: Path) -> None:
    """Models and prompts of both cases."""
    from lit_rl.miniatures.images import build_sd3
    from lit_rl.miniatures.lm import build_lm

    build_sd3(folder / "flow")
    build_lm(folder / "language", vocab_size=1024, hidden=64, layers=2, chat=False)
    letters = "abcdefghijklmnopqrstuvwxyz"
    (folder / "rows.jsonl").write_text("".join(json.dumps({"prompt": letters[i % 7 : i % 7 + 16]}) + "\n" for i in range(64)))


def main(arguments: Sequence[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--iterations", type=int, default=12, help="timed iterations of a turn")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each arm")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # of a process of an arm
    args = parser.parse_args(arguments)
    if args.folder:
        train(args.case[0], args.folder, args.iterations)
        return ""
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name))
        table = "\n".join(compare(case, Path(name), iterations=args.iterations, rounds=args.rounds) for case in args.case)
    print(table)
    return table


if __name__ == "__main__":
    main()
