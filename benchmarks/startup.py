"""CPU seconds from the command to a mistake's sentence, and to a first optimizer step.

    python -m benchmarks.startup [--repeats 5]

Each row is a process of its own with one thread; rows take turns. `import torch` and `import lightning` are what no run can do without;
`first forward` and `one step` are `python cli.py fit` of SFT on a miniature language model until the process has its first forward, and
with one optimizer step. The peer of the former is a plain script that imports torch, transformers and diffusers and does the same forward,
as published trainers do before they train. Prints the least CPU seconds (user and system) of all repeats, which other work on the machine
lengthens least, and the ratio to the plain script.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from lit_rl.miniatures.lm import build_lm

ROOT = Path(__file__).parents[1]
RUN = """
model:
  class_path: lit_rl.methods.sft.SFT
  init_args:
    policy: {{class_path: lit_rl.policies.causal_lm.CausalLM, init_args: {{pretrained: {folder}/lm}}}}
    prompts_per_iteration: 4
data: {{class_path: datamodules.supervised.SupervisedText, init_args: {{train: {folder}/rows.jsonl, prompt_key: p, response_key: r}}}}
trainer: {{accelerator: cpu, devices: 1, max_epochs: 1, limit_val_batches: 0}}
run: {{dir: {folder}/runs}}
"""
LEAVE = """
import os

import lightning as L


class LeaveAfterForward(L.Callback):
    def on_train_start(self, trainer, pl_module):
        pl_module.policy.network.register_forward_hook(lambda *_: os._exit(0))
"""
PLAIN = """
import diffusers, os, torch, transformers

model = transformers.AutoModelForCausalLM.from_pretrained("{folder}/lm")
tokenizer = transformers.AutoTokenizer.from_pretrained("{folder}/lm")
model(torch.tensor([tokenizer("a b")["input_ids"]] * 4))
os._exit(0)
"""


def commands(folder: Path) -> dict[str, list[str]]:
    """What is measured, by name."""
    build_lm(folder / "lm", vocab_size=128, hidden=32, layers=1, chat=False)
    (folder / "rows.jsonl").write_text("".join(json.dumps({"p": "a", "r": "b"}) + "\n" for _ in range(4)))
    (folder / "leave.py").write_text(LEAVE)
    (folder / "plain.py").write_text(PLAIN.format(folder=folder))
    right, wrong = folder / "right.yaml", folder / "wrong.yaml"
    right.write_text(RUN.format(folder=folder))
    wrong.write_text(RUN.format(folder=folder).replace("prompts_per_iteration", "prompts_per_iterations"))
    fit = [sys.executable, str(ROOT / "cli.py"), "fit", "--config"]
    return {
        "import torch": [sys.executable, "-c", "import torch"],
        "import lightning": [sys.executable, "-c", "import lightning"],
        "a missing file": [*fit, str(folder / "rigth.yaml")],
        "a wrong key": [*fit, str(wrong)],
        "plain script": [sys.executable, str(folder / "plain.py")],
        "first forward": [*fit, str(right), "--trainer.callbacks+=leave.LeaveAfterForward"],
        "one step": [*fit, str(right)],
    }


def cpu_seconds(command: Sequence[str], folder: Path, *, fails: bool) -> float:
    """User and system time of a process and its children. Raises SystemExit where it does not end as expected."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    with (folder / "said.txt").open("w") as said:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if (process.returncode != 0) != fails:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{(folder / 'said.txt').read_text()[-2000:]}")
    return usage.ru_utime + usage.ru_stime


def report(found: Mapping[str, float]) -> str:
    lines = [f"{'':20}{'CPU s':>8}{'/ plain script':>20}"]
    return "\n".join(lines + [f"{name:20}{seconds:8.2f}{seconds / found['plain script']:20.2f}" for name, seconds in found.items()])


def main(arguments: Sequence[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = commands(folder)
        taken: dict[str, list[float]] = {row: [] for row in rows}
        for _ in range(args.repeats):
            shutil.rmtree(folder / "runs", ignore_errors=True)  # where a finished run lies no other begins
            for row, command in rows.items():
                taken[row].append(cpu_seconds(command, folder, fails=row in ("a missing file", "a wrong key")))
    print(table := report({row: min(seconds) for row, seconds in taken.items()}))
    return table


if __name__ == "__main__":
    main()
