"""The demo of language models: a miniature Qwen2 learns to sort six digits, from demonstrations and then from a rule alone.

    python -m lit_rl.demo.sorting [--method grpo|rloo|gspo|dapo|ppo|dpo] [--seed 0]

A model and tokenizer in transformers format, JSONL files, supervised fine-tuning, an export that reinforcement learning starts from,
evaluation of sampled answers on held-out prompts, a picture of what was learned. DPO learns from pairs of a right and a wrong answer that
the fine-tuned model itself gave to the same prompt.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from lit_rl.demo.commands import begin, cli, say
from lit_rl.demo.curves import Curve, read_curves
from lit_rl.demo.stages import Reached, arguments, exported, kept, plot, reached

OUT = Path("outputs/demo-llm")
METHODS = {"grpo": "GRPO", "rloo": "RLOO", "gspo": "GSPO", "dapo": "DAPO", "ppo": "PPO", "dpo": "DPO"}
DIGITS, HELD_OUT, TRAIN = 6, 256, 8000
PAIR_PROMPTS, PAIR_SAMPLES = 1600, 8
ACCURACY = "val/score"


def main() -> None:
    """Run the demo of a language model."""
    args = arguments(__doc__, METHODS)
    method, title, seed = args.method, METHODS[args.method], ["--seed_everything", str(args.seed)]
    started = begin(config(method))
    seconds = {"warmup": kept(OUT, args.seed, partial(fine_tune, args.seed))}
    evaluation = f"{method}-learned"
    for old in (method, evaluation):
        shutil.rmtree(OUT / old, ignore_errors=True)
    if method == "dpo":
        say("eight answers of the fine-tuned model to each prompt; a right and a wrong one become a pair")
        pairs = write_pairs(OUT / "data", seed)
        say(f"DPO on {pairs} pairs, from the exported model")
    else:
        say(f"{title} against the gsm8k rule, from the exported model")
    seconds["rl"] = cli("fit", "--config", config(method), *seed)
    learned = ["--model.init_args.policy.init_args.pretrained", str(exported(OUT / method)), "--run.name", evaluation]
    cli("validate", "--config", config("grpo"), *learned, *seed)
    cli("predict", "--config", config("grpo"), *learned, *seed, "--texts.output_file", str(OUT / method / "answers.jsonl"))
    before, after = (read_curves(OUT / name / "logs")[ACCURACY].values[-1] for name in ("sft", evaluation))
    curves = read_curves(OUT / method / "logs")
    summary = summarize(before, after, curves, seconds=seconds, seed=args.seed)
    written = OUT / ("summary.json" if method == "grpo" else f"summary-{method}.json")
    written.write_text(json.dumps(summary, indent=2) + "\n")
    picture = OUT / ("demo.png" if method == "grpo" else f"demo-{method}.png")
    draw(picture, title, before, after, curves)
    accuracy = summary["held_out_accuracy"]
    say(
        f"held-out prompts answered right, sampled at temperature 1: {accuracy['after_warmup']:.0%} after fine-tuning, "
        f"{accuracy['after_rl']:.0%} after {title} on {summary['answers_trained']} answers ({time.perf_counter() - started:.0f} s in all)"
    )
    say(f"see {picture}, {written} and {OUT / method / 'answers.jsonl'}")


def config(stage: str) -> str:
    """Path of the YAML of a stage."""
    return f"configs/demo/{stage}_sort.yaml"


def fine_tune(seed: int) -> float:
    """Make model, data and the fine-tuned model that all methods start from, and return the seconds that this took."""
    say(f"building a miniature Qwen2 in {OUT / 'model'}/ and its data in {OUT / 'data'}/")
    prepare(OUT, seed)
    say("supervised fine-tuning on sorted digits, stopped half-way")
    return cli("fit", "--config", config("sft"), "--seed_everything", str(seed))


def write_pairs(data: Path, seed: list[str]) -> int:
    """pairs.jsonl of the first right and the first wrong answer to each prompt that got both; how many there are."""
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()[:PAIR_PROMPTS]]
    asked, answered = data / "asked.jsonl", data / "answered.jsonl"
    asked.write_text("".join(json.dumps(row | {"id": str(i)}) + "\n" for i, row in enumerate(rows) for _ in range(PAIR_SAMPLES)))
    cli("predict", "--config", config("grpo"), *seed, "--data.init_args.predict", str(asked), "--texts.output_file", str(answered))
    pairs = best_and_worst(rows, [json.loads(line) for line in answered.read_text().splitlines()])
    (data / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return len(pairs)


def best_and_worst(rows: Sequence[Mapping[str, str]], answers: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """{prompt, chosen, rejected} for each row with answers of both kinds. answers: with the number of their row as `id`."""
    given: dict[str, list[str]] = {str(i): [] for i in range(len(rows))}
    for answer in answers:
        given[answer["id"]].append(answer["response"])
    pairs = []
    for i, row in enumerate(rows):
        right = [text for text in given[str(i)] if text == row["response"]]
        wrong = [text for text in given[str(i)] if text != row["response"] and text]
        if right and wrong:
            pairs.append({"prompt": row["prompt"], "chosen": right[0], "rejected": wrong[0]})
    return pairs


def prepare(out: Path, seed: int) -> None:
    """A random model, and numbers of which some are held out."""
    import torch

    from lit_rl.miniatures.lm import build_lm
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


class Summary(Reached):
    """The content of summary.json."""

    answers_trained: int


def summarize(before: float, after: float, curves: Mapping[str, Curve], *, seconds: Mapping[str, float], seed: int) -> Summary:
    """The content of summary.json; accuracy is the share of held-out prompts whose sampled answer is right."""
    answers = curves["samples"].values if "samples" in curves else [2 * n for n in curves["pairs"].values]
    return {**reached(before, after, seconds=seconds, seed=seed), "answers_trained": sum(round(n) for n in answers)}


def draw(file: Path, title: str, before: float, after: float, curves: Mapping[str, Curve]) -> None:
    """One PNG: training reward and held-out accuracy over the optimizer steps of a method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6.5, 4), layout="constrained")
    accuracy = curves.get(ACCURACY, Curve(curves["loss"].steps[-1:], [after]))
    plot(axis, before, accuracy, curves.get("reward_mean"), names=("held-out prompts", "training reward (mean of the iteration)"))
    axis.set(xlabel=f"optimizer steps of {title}", ylabel="sampled answers that are right", ylim=(0, 1))
    axis.set_title("Sorting six digits, from half right after fine-tuning")
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
