"""What a data set costs until training starts: JSONL rows opened, checked and tokenized, at the first start and at the next one.

    python -m benchmarks.data [--rows 1000000] [--tokenize 100000]

Ours is `TextPrompts`: every row is parsed, checked field by field, and tokenized for its length. The peer is `datasets`:
`load_dataset("json")` and a batched `map` that tokenizes; it checks no row. Every arm is a process of its own, one thread, with an empty
cache at its first start. Prints CPU seconds from after the imports, the growth of the highest resident memory, and the ratios. Then one
letter of the last row is changed, with the file's time and size kept, and both say what they see.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

ARMS = ("ours", "datasets")
Cost = dict[str, float]


def write_rows(path: Path, rows: int) -> None:
    """Questions with an answer, as verl writes them."""
    with open(path, "w", encoding="utf-8") as file:
        for i in range(rows):
            question = f"Natalia sold clips to {i} of her friends in April, and then she sold half as many clips in May. How many?"
            row = {"prompt": question, "reward_model": {"style": "rule", "ground_truth": str(i)}, "extra_info": {"index": i}}
            file.write(json.dumps(row) + "\n")


@contextmanager
def measured(cost: Cost, name: str) -> Iterator[None]:
    """CPU seconds of a block, and MiB by which it has raised the highest memory of the process."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    yield
    cost[name] = time.process_time() - start
    cost[f"{name} MiB"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def ours(path: Path, model: Path, tokenize: int) -> Cost:
    """Open all rows; tokenize the first ones."""
    from datamodules.prompts_text import TextPrompts
    from lit_rl.policies.causal_lm import CausalLM

    cost: Cost = {}
    policy = CausalLM(str(model))
    assert policy.stop_ids
    with measured(cost, "open"):
        data = TextPrompts(train=str(path))
    cost["last"] = float(data.train_prompts[-1]["prompt"].startswith("Natalia"))
    some = TextPrompts(train=str(path), max_train=tokenize, max_prompt_length=1024)
    some.trainer = SimpleNamespace(world_size=1, global_rank=0, lightning_module=SimpleNamespace(policy=policy))  # type: ignore[assignment]
    with measured(cost, "tokenize"):
        some.setup("fit")
    return cost


def datasets(path: Path, model: Path, tokenize: int) -> Cost:
    """The same with `datasets`."""
    import transformers
    from datasets import Dataset, disable_progress_bars, load_dataset

    disable_progress_bars()
    cost: Cost = {}
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(model))
    with measured(cost, "open"):
        data = load_dataset("json", data_files=str(path), split="train", cache_dir=str(path.parent / "datasets"))
    assert isinstance(data, Dataset)
    cost["last"] = float(data[-1]["prompt"].startswith("Natalia"))
    some = data.select(range(min(tokenize, len(data))))
    with measured(cost, "tokenize"):
        some.map(lambda rows: {"length": [len(ids) for ids in tokenizer(rows["prompt"]).input_ids]}, batched=True)
    return cost


def started(arm: str, path: Path, model: Path, tokenize: int) -> Cost:
    """The costs of an arm in a new process."""
    quiet = {
        "LIT_RL_CACHE": str(path.parent / "ours"),
        "OMP_NUM_THREADS": "1",
        "RAYON_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    command = [
        sys.executable,
        "-m",
        "benchmarks.data",
        "--arm",
        arm,
        "--file",
        str(path),
        "--model",
        str(model),
        "--tokenize",
        str(tokenize),
    ]
    done = subprocess.run(command, env={**os.environ, **quiet}, stdout=subprocess.PIPE, text=True, check=True)
    cost: Cost = json.loads(done.stdout.splitlines()[-1])
    return cost


def changed(path: Path) -> None:
    """Another letter in the last row, the file's time and size kept."""
    stamp = path.stat()
    with open(path, "r+b") as file:
        file.seek(stamp.st_size - 1000 if stamp.st_size > 1000 else 0)
        tail = file.read()
        file.seek(-(len(tail) - tail.rindex(b"Natalia")), os.SEEK_END)
        file.write(b"B")
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))


def compare(rows: int, tokenize: int, folder: Path, show: Callable[[str], None] = print) -> dict[str, dict[str, Cost]]:
    """Costs by arm and start: `first`, `next`, `changed`."""
    from lit_rl.miniatures.lm import build_lm

    path, model = folder / "rows.jsonl", build_lm(folder / "lm", hidden=32)
    write_rows(path, rows)
    costs: dict[str, dict[str, Cost]] = {arm: {} for arm in ARMS}
    show(f"{rows} rows, {path.stat().st_size / 2**20:.0f} MiB; {tokenize} of them tokenized; CPU seconds, and MiB of memory")
    for start in ("first", "next", "changed"):
        if start == "changed":
            changed(path)
        for arm in ARMS:
            costs[arm][start] = started(arm, path, model, tokenize)
        for what in ("open", "tokenize"):
            mine, theirs = (costs[arm][start] for arm in ARMS)
            told = ", ".join(f"{arm} {costs[arm][start][what]:.3f} s {costs[arm][start][what + ' MiB']:.0f} MiB" for arm in ARMS)
            show(f"{start:8}{what:9}{told}; ratio {mine[what] / theirs[what]:.2f}")
    for arm in ARMS:
        show(f"{arm} sees the changed row: {'no' if costs[arm]['changed']['last'] else 'yes'}")
    return costs


def main() -> None:
    """Print the comparison, or the costs of one arm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--tokenize", type=int, default=100_000, help="rows that are tokenized")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        print(json.dumps({"ours": ours, "datasets": datasets}[args.arm](args.file, args.model, args.tokenize)))
        return
    with tempfile.TemporaryDirectory() as folder:
        compare(args.rows, args.tokenize, Path(folder))


if __name__ == "__main__":
    main()
