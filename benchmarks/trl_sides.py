"""The sides of `trl_compare.py`: what one process trains, turn by turn. It is started by that script, not by hand."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import lightning as L
import torch
from torch import Tensor

from benchmarks.token_logprobs import high_water_mark
from lit_rl.rewards.base import TextReward
from lit_rl.rollouts.answers import Answers
from lit_rl.types import Info

LR, CLIP, BETA = 1e-4, 1.0, 0.1
KEYS = {"sft": ("prompt", "completion"), "dpo": ("prompt", "chosen", "rejected"), "grpo": ("prompt",)}


@dataclass(frozen=True)
class Case:
    """A Qwen2 of random weights (tied embeddings) and rows of random letters.

    rows: Of an optimizer step: conversations, pairs, or answers to one prompt.
    prompt, answer: Tokens, of an answer with the one that ends it.
    """

    method: str  # sft, dpo or grpo
    vocab: int
    rows: int
    prompt: int
    answer: int
    hidden: int = 128
    layers: int = 4

    @property
    def tokens(self) -> int:
        """Trained in a step."""
        return self.rows * self.answer * (2 if self.method == "dpo" else 1)

    def data(self, steps: int) -> list[dict[str, str]]:
        """The rows of all steps in order; their answers lack the end, which both sides add."""
        drawn = torch.Generator().manual_seed(0)
        sizes = {"prompt": self.prompt, "completion": self.answer - 1, "chosen": self.answer - 1, "rejected": self.answer - 1}

        def text(size: int) -> str:
            return "".join(chr(ord("a") + i) for i in torch.randint(26, (size,), generator=drawn).tolist())

        per_step = 1 if self.method == "grpo" else self.rows
        return [{key: text(sizes[key]) for key in KEYS[self.method]} for _ in range(steps * per_step)]


class Turns:
    """Lets `size` steps pass, tells what they cost, and waits for the next turn. The first turn is the warm-up.

    A line {"ready": ...} when training may start, {"turn": {clock, cpu}} per step of each turn, and {"end": ...} at last.
    """

    def __init__(self, size: int, told: TextIO, heard: TextIO) -> None:
        self.size, self.told, self.heard = size, told, heard
        self.losses: list[float] = []
        self.tokens: list[int] = []

    def begin(self) -> None:
        """The model is loaded."""
        self._tell("ready", {"threads": torch.get_num_threads()})
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        self.before = high_water_mark()
        self._wait()

    def step(self, loss: Tensor | float, tokens: int) -> None:
        """An optimizer step is over."""
        self.losses.append(float(loss))
        self.tokens.append(tokens)
        if len(self.losses) % self.size == 0:
            spent = {"clock": time.perf_counter() - self.clock, "cpu": time.process_time() - self.cpu}
            self._tell("turn", {name: value / self.size for name, value in spent.items()})
            self._wait()

    def end(self) -> None:
        growth = high_water_mark() - self.before
        self._tell("end", {"growth": growth, "losses": self.losses, "tokens": self.tokens})

    def _tell(self, name: str, value: Any) -> None:
        print(json.dumps({name: value}), file=self.told, flush=True)

    def _wait(self) -> None:
        self.heard.readline()
        self.clock, self.cpu = time.perf_counter(), time.process_time()


# ---------------------------------------------------------------------- ours
class EveryOther(TextReward):
    """1, 0, 1, 0, ...: half of the answers of a group are right."""

    outputs = ("right",)

    def score(self, media: Sequence[str], info: Sequence[Info]) -> Mapping[str, Tensor]:
        return {"right": torch.tensor([float(i % 2 == 0) for i in range(len(media))])}


class Steps(L.Callback):
    """Tells of every step, which here is a minibatch."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.turns.begin()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.turns.step(outputs["loss"], pl_module.count_actions(batch))


def ours(case: Case, folder: Path, steps: int, turns: Turns) -> None:
    """A run as its YAML describes it: one optimizer step per iteration."""
    from callbacks.reward_scoring import RewardScoring
    from datamodules.pairs import PreferencePairs
    from datamodules.prompts_text import TextPrompts
    from datamodules.supervised import SupervisedText
    from lit_rl.methods.dpo import DPO
    from lit_rl.methods.grpo import GRPO
    from lit_rl.methods.sft import SFT
    from lit_rl.policies.causal_lm import CausalLM
    from lit_rl.rollouts.base import Sampling

    policy = CausalLM(str(folder), keep_reference=case.method == "dpo")
    settings: dict[str, Any] = {"prompts_per_iteration": case.rows}
    settings["optimizer"] = lambda groups: torch.optim.AdamW(groups, lr=LR, weight_decay=0.0, fused=True)
    rows = str(_jsonl(case.data(steps), folder / "rows.jsonl"))
    data: Any
    callbacks: list[L.Callback] = [Steps(turns)]
    if case.method == "sft":
        method: Any = SFT(policy, **settings)
        data = SupervisedText(train=rows, prompt_key="prompt", response_key="completion", shuffle=False)
    elif case.method == "dpo":
        method, data = DPO(policy, beta=BETA, **settings), PreferencePairs(train=rows, shuffle=False)
    else:
        policy.stop_ids = []  # type: ignore[assignment]  # every answer has full length
        method = GRPO(
            policy,
            **settings | {"prompts_per_iteration": 1},
            group_size=case.rows,
            answers=Answers(sampling=Sampling(max_new_tokens=case.answer)),
        )
        data = TextPrompts(train=rows, shuffle=False)
        callbacks.append(RewardScoring({"right": EveryOther()}))
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=steps, gradient_clip_val=CLIP, callbacks=callbacks, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(method, data)


def _jsonl(rows: Sequence[Mapping[str, str]], file: Path) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


# ---------------------------------------------------------------------- theirs
def common_settings(case: Case, folder: Path, steps: int) -> dict[str, Any]:
    """Arguments of `transformers.TrainingArguments` and of TRL's; defaults that cost without a GPU are off."""
    return {
        "output_dir": str(folder / "theirs"), "max_steps": steps, "per_device_train_batch_size": case.rows, "learning_rate": LR,
        "weight_decay": 0.0, "max_grad_norm": CLIP, "lr_scheduler_type": "constant", "use_cpu": True, "bf16": False,
        "gradient_checkpointing": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip


def trl(case: Case, folder: Path, steps: int, turns: Turns) -> None:
    """TRL's trainer with the same settings."""
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings = common_settings(case, folder, steps)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    common: dict[str, Any] = {
        "model": model, "train_dataset": Dataset.from_list(case.data(steps)), "processing_class": AutoTokenizer.from_pretrained(folder),
    }  # fmt: skip
    if case.method == "sft":
        trainer: Any = trl.SFTTrainer(args=trl.SFTConfig(**settings, train_sampling_strategy="sequential"), **common)
    elif case.method == "dpo":
        trainer = trl.DPOTrainer(args=trl.DPOConfig(**settings, beta=BETA, train_sampling_strategy="sequential"), **common)
    else:
        model.generation_config.eos_token_id = None
        sampling = {"num_generations": case.rows, "max_completion_length": case.answer, "generation_kwargs": {"eos_token_id": None}}
        args = trl.GRPOConfig(**settings, **sampling, shuffle_dataset=False)
        trainer = trl.GRPOTrainer(args=args, reward_funcs=_every_other, **common)
        trainer.eos_token_ids = [-1]  # every answer has full length
    told_of_steps(trainer, turns)
    trainer.train()


def transformers(case: Case, folder: Path, steps: int, turns: Turns) -> None:
    """`transformers.Trainer` on rows that were tokenized before the time starts: the model's own cross-entropy, no metrics."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

    if case.method != "sft":
        raise SystemExit(f"transformers.Trainer has no {case.method}: leave --side transformers out, or take an sft case")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = []
    for row in case.data(steps):
        prompt, answer = tokenizer(row["prompt"]).input_ids, [*tokenizer(row["completion"]).input_ids, tokenizer.eos_token_id]
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    args = TrainingArguments(**common_settings(case, folder, steps), train_sampling_strategy="sequential")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    trainer = Trainer(model=model, args=args, train_dataset=rows)  # type: ignore[arg-type]  # a list is a sized data set
    told_of_steps(trainer, turns)
    trainer.train()


def told_of_steps(trainer: Any, turns: Turns) -> None:
    """Have a trainer of transformers, or of TRL, tell `turns` of each step, its loss, and its trained tokens."""
    from transformers import TrainerCallback

    seen: list[Any] = [0.0, 0]
    compute: Callable[..., Any] = trainer.compute_loss

    class Told(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            turns.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.step(*seen)

    def noted(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        learned = inputs["labels"][:, 1:] != -100 if "labels" in inputs else inputs["completion_mask"]
        loss = compute(model, inputs, *args, **kwargs)
        seen[:] = [loss.detach(), int(learned.sum())]
        return loss

    trainer.compute_loss = noted
    trainer.add_callback(Told())


def _every_other(completions: Sequence[Any], **_: Any) -> list[float]:
    return [float(i % 2 == 0) for i in range(len(completions))]


SIDES: dict[str, Callable[[Case, Path, int, Turns], None]] = {"ours": ours, "trl": trl, "transformers": transformers}


def command(side: str, case: Case, folder: Path, *, turns: int, size: int, core: int) -> list[str]:
    """The command that starts a side in its own process: one thread on one core, lines as `Turns` writes and reads them."""
    wanted = {"side": side, "case": asdict(case), "folder": str(folder), "turns": turns, "size": size, "core": core}
    return [sys.executable, "-m", "benchmarks.trl_sides", json.dumps(wanted)]


def main(wanted: Mapping[str, Any]) -> None:
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed
    os.sched_setaffinity(0, {wanted["core"]})
    torch.set_num_threads(1)
    turns = Turns(wanted["size"], told, sys.stdin)
    SIDES[wanted["side"]](Case(**wanted["case"]), Path(wanted["folder"]), wanted["turns"] * wanted["size"], turns)
    turns.end()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
