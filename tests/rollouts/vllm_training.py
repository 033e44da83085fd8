"""Short trainings whose rewards rise, for a comparison of engines."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from squares import Corner
from test_http import Small
from torch import Tensor
from toy_text import Digits, trainer

from callbacks.reward_scoring import RewardScoring
from datamodules.prompts_text import TextPrompts
from lit_rl.losses.off_policy import Correction
from lit_rl.methods.grpo import GRPO
from lit_rl.policies.causal_lm import CausalLM
from lit_rl.policies.vision_language import VisionLanguageModel
from lit_rl.policies.weights.lora import LoraSettings
from lit_rl.rollouts.answers import Answers
from lit_rl.rollouts.base import RolloutEngine, Sampling
from lit_rl.types import Info

ITERATIONS = 20


class Rewards(Callback):
    """The mean reward of each iteration."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seen.append(float(trainer.callback_metrics["reward_mean"]))


class Near(Corner):
    """1 for the corner that the row names, half for another one."""

    def score(self, media: Sequence[str], info: Sequence[Info]) -> Mapping[str, Tensor]:
        some = torch.tensor([0.5 * float(text in ("1", "2", "3", "4")) for text in media])
        return {"exact": some + 0.5 * super().score(media, info)["exact"]}


def rewards(
    model: Path,
    lora: LoraSettings | None,
    engine: RolloutEngine,
    *,
    seed: int = 0,
    asynchronous: bool = False,
    late: bool = False,
    squares: Path | None = None,
) -> list[float]:
    """GRPO of 20 iterations on the share of small digits in an answer: 8 prompts, 8 answers each; its curve reaches the top.

    late: The answers are of the weights of an iteration ago, and corrected for it. squares: A file of prompts with images instead, whose
    answers are a digit: half of the reward is for any that is a corner's.
    """
    torch.manual_seed(0)
    sampling = Sampling(max_new_tokens=6 if squares is None else 1)
    settings: dict[str, Any] = dict(
        answers=Answers(engine=engine, sampling=sampling, chunk=32, asynchronous=asynchronous),
        prompts_per_iteration=8,
        group_size=8,
        seed=seed,
        correction=Correction() if late else None,
        optimizer=partial(torch.optim.AdamW, lr=3e-3 if lora else 6e-4),
    )
    seen = Rewards()
    scored = RewardScoring({"small": Small()} if squares is None else {"near": Near()})
    run = trainer(max_epochs=ITERATIONS, callbacks=[scored, seen], limit_val_batches=0, enable_checkpointing=False)
    if squares is None:
        run.fit(GRPO(CausalLM(str(model), lora=lora), **settings), datamodule=Digits())
    else:
        run.fit(GRPO(VisionLanguageModel(str(model), lora=lora), **settings), datamodule=TextPrompts(train=str(squares)))
    assert seen.seen[0] < 0.35 and min(seen.seen[-3:]) > (0.85 if squares is None else 0.4)
    return seen.seen


def assert_within_noise(levels: Mapping[str, tuple[float, Sequence[float]]]) -> None:
    """A run over HTTP is as good as runs in process, whose seeds say what noise is. levels: (over HTTP, in process) by name."""
    for name, (found, inside) in levels.items():
        noise = max(0.03, 3 * statistics.stdev(inside))
        print(f"{name}: {found:.3f}, in process {statistics.mean(inside):.3f} +- {noise:.3f}")
        assert abs(found - statistics.mean(inside)) < noise, (name, found, inside)


def level(curve: list[float]) -> float:
    """The mean reward over a whole run: how fast it rises and how far."""
    assert len(curve) == ITERATIONS
    return sum(curve) / ITERATIONS
