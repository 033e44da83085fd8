"""The demo of language models: a miniature Qwen2 learns to sort six digits, from demonstrations and then from a rule alone.

    python -m lit_rl.demo.sorting [--seed 0]

A model and tokenizer in transformers format, JSONL files, supervised fine-tuning, an export that reinforcement learning starts from,
evaluation of sampled answers on held-out prompts, a picture of what was learned.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lit_rl.demo.__main__ import QUIET, cli, say
from lit_rl.demo.curves import Curve, read_curves

OUT = Path("outputs/demo-llm")
SFT, GRPO = "configs/demo/sft_sort.yaml", "configs/demo/grpo_sort.yaml"
DIGITS, HELD_OUT, TRAIN = 6, 256, 8000
ACCURACY = "val/score"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not Path(GRPO).is_file():
        raise SystemExit(f"error: {GRPO} is not here; run the demo from the folder of the repository")
    os.environ |= QUIET
    started = time.perf_counter()
    if OUT.exists():
        say(f"removing the previous demo in {OUT}/")
        shutil.rmtree(OUT)
    say(f"building a miniature Qwen2 in {OUT / 'model'}/ and its data in {OUT / 'data'}/")
    prepare(OUT, args.seed)
    seed = ["--seed_everything", str(args.seed)]
    say("supervised fine-tuning on sorted digits, stopped half-way")
    seconds = {"warmup": cli("fit", "--config", SFT, *seed)}
    say("GRPO against the gsm8k rule, from the exported model")
    seconds["rl"] = cli("fit", "--config", GRPO, *seed)
    cli("predict", "--config", GRPO, *seed, "--ckpt_path", "last", "--texts.output_file", str(OUT / "answers.jsonl"))
    sft, rl = read_curves(OUT / "logs/sft"), read_curves(OUT / "logs/grpo")
    summary = summarize(sft[ACCURACY], rl[ACCURACY], rl["samples"], seconds=seconds, seed=args.seed)
    (OUT / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    draw(OUT / "demo.png", sft[ACCURACY], rl)
    accuracy = summary["held_out_accuracy"]
    say(
        f"held-out prompts answered right, sampled at temperature 1: {accuracy['after_warmup']:.0%} after fine-tuning, "
        f"{accuracy['after_rl']:.0%} after {summary['answers_trained']} answers of reinforcement learning "
        f"({time.perf_counter() - started:.0f} s in all)"
    )
    say(f"see {OUT / 'demo.png'}, {OUT / 'summary.json'} and {OUT / 'answers.jsonl'}")


def prepare(out: Path, seed: int) -> None:
    """A random model, and numbers of which some are held out."""
    import torch

    from lit_rl.policies.tiny_lm import build_lm
    from lit_rl.seeding import generator

    build_lm(out / "model", characters="0123456789+=# ?", chat=False, hidden=64, layers=2, heads=4, kv_heads=4, seed=seed)
    numbers = torch.randperm(10**DIGITS, generator=generator("sorting"))[: HELD_OUT + TRAIN].tolist()
    write_rows(out / "data/val.jsonl", numbers[:HELD_OUT])
    write_rows(out / "data/train.jsonl", numbers[HELD_OUT:])


def write_rows(file: Path, numbers: Iterable[int]) -> None:
    """{prompt "483920=", response "#### 023489", and what the gsm8k rule asks for} for each number."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w") as lines:
        for number in numbers:
            digits = f"{number:0{DIGITS}d}"
            answer = "".join(sorted(digits))
            row = {"prompt": f"{digits}=", "response": f"#### {answer}", "data_source": "gsm8k"}
            lines.write(json.dumps(row | {"reward_model": {"style": "rule", "ground_truth": answer}}) + "\n")


def summarize(sft: Curve, rl: Curve, answers: Curve, *, seconds: Mapping[str, float], seed: int) -> dict[str, Any]:
    """What summary.json holds: accuracy is the share of held-out prompts whose sampled answer is right."""
    return {
        "held_out_accuracy": {"after_warmup": round(sft.values[-1], 4), "after_rl": round(rl.values[-1], 4)},
        "answers_trained": sum(round(n) for n in answers.values),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "seed": seed,
    }


def draw(file: Path, sft: Curve, rl: Mapping[str, Curve]) -> None:
    """One PNG: training reward and held-out accuracy over the iterations of reinforcement learning."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6.5, 4), layout="constrained")
    reward, accuracy = rl["reward_mean"], rl[ACCURACY]
    axis.plot([step + 1 for step in reward.steps], reward.values, color="#9aa5b1", label="training reward (mean of the iteration)")
    axis.plot(
        [0, *(step + 1 for step in accuracy.steps)], [sft.values[-1], *accuracy.values], "o-", color="#1f6feb", label="held-out prompts"
    )
    axis.set(xlabel="GRPO iterations of 32 prompts x 8 answers", ylabel="sampled answers that are right", ylim=(0, 1))
    axis.set_title("Sorting six digits: from half right after SFT")
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right")
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
