"""Short trainings whose rewards rise, for a comparison of engines."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from lightning import Callback, LightningModule, Trainer
from test_http import Small
from toy_text import Digits, trainer

from callbacks.reward_scoring import RewardScoring
from lit_rl.losses.off_policy import Correction
from lit_rl.methods.grpo import GRPO
from lit_rl.policies.causal_lm import CausalLM
from lit_rl.policies.weights.lora import LoraSettings
from lit_rl.rollouts.answers import Answers
from lit_rl.rollouts.base import RolloutEngine, Sampling

ITERATIONS = 20


class Rewards(Callback):
    """The mean reward of each iteration."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seen.append(float(trainer.callback_metrics["reward_mean"]))


def rewards(
    model: Path,
    lora: LoraSettings | None,
    engine: RolloutEngine,
    *,
    seed: int = 0,
    asynchronous: bool = False,
    late: bool = False,
) -> list[float]:
    """GRPO of 20 iterations on the share of small digits in an answer: 8 prompts, 8 answers each; its curve reaches the top.

    late: The answers are of the weights of an iteration ago, and corrected for it.
    """
    torch.manual_seed(0)
    answers = Answers(engine=engine, sampling=Sampling(max_new_tokens=6), chunk=32, asynchronous=asynchronous)
    method = GRPO(
        CausalLM(str(model), lora=lora),
        answers=answers,
        prompts_per_iteration=8,
        group_size=8,
        seed=seed,
        correction=Correction() if late else None,
        optimizer=partial(torch.optim.AdamW, lr=3e-3 if lora else 6e-4),
    )
    seen = Rewards()
    callbacks = [RewardScoring({"small": Small()}), seen]
    trainer(max_epochs=ITERATIONS, callbacks=callbacks, limit_val_batches=0, enable_checkpointing=False).fit(method, datamodule=Digits())
    assert seen.seen[0] < 0.35 and min(seen.seen[-3:]) > 0.85
    return seen.seen


def level(curve: list[float]) -> float:
    """The mean reward over a whole run: how fast it rises and how far."""
    assert len(curve) == ITERATIONS
    return sum(curve) / ITERATIONS
