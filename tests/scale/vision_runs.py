"""Runs of vision-language models in the processes of a scale test: rows with 0 to 3 pictures, the same run in one process and in two."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from copies import every_step
from scenarios import STRATEGIES
from squares import Corner
from toy_text import trainer

from callbacks.reward_scoring import RewardScoring
from callbacks.rng_state import RngState
from datamodules.prompts_text import TextPrompts
from datamodules.supervised import SupervisedText
from lit_rl.losses.kl import KL
from lit_rl.methods.grpo import DAPO, GRPO
from lit_rl.methods.ppo import PPO
from lit_rl.methods.sft import SFT
from lit_rl.modules.dynamic import DynamicSampling
from lit_rl.policies.vision_language import VisionLanguageModel
from lit_rl.policies.weights.lora import LoraSettings
from lit_rl.policies.weights.shards import gathered
from lit_rl.rollouts.answers import Answers
from lit_rl.rollouts.base import Sampling
from lit_rl.rollouts.hf import HFEngine

ADAM = partial(torch.optim.AdamW, lr=1e-2, eps=1e-3)
ROWS: dict[str, Any] = dict(prompts_per_iteration=8, prompts_per_update=4, optimizer=ADAM)


def method_of(name: str, policy: VisionLanguageModel) -> Any:
    if name == "sft":
        return SFT(policy, **ROWS)
    answers = Answers(engine=HFEngine(batch=4), sampling=Sampling(max_new_tokens=3), chunk=5, old_logprobs="recompute")
    settings = ROWS | {"group_size": 4, "answers": answers, "kl": KL(coef=0.1)}
    if name == "dapo":
        return DAPO(policy, **settings, dynamic_sampling=DynamicSampling(prompts_per_generation=6, max_generations=20))
    return {"grpo": GRPO, "ppo": PPO}[name](policy, **settings)


def fit(
    model: str,
    data: str,
    out: str,
    strategy: str,
    *,
    method: str,
    parts: int = 1,
    lora: bool = False,
    train_vision: bool = False,
    save: bool = False,
    ckpt_path: str | None = None,
) -> dict[str, Any]:
    """Two iterations; every trained weight, whole, is written into out/end.pt."""
    torch.manual_seed(0)
    at = Path(out)
    at.mkdir(parents=True, exist_ok=True)
    adapter = LoraSettings(rank=4, alpha=16.0) if lora else None
    policy = VisionLanguageModel(model, lora=adapter, keep_reference=True, train_vision=train_vision)
    module = method_of(method, policy)
    callbacks = [RngState(), *([] if method == "sft" else [RewardScoring({"corner": Corner()})])]
    callbacks += [every_step(at)] if save else []
    alone = strategy == "one"
    run = trainer(
        max_epochs=2,
        limit_val_batches=0,
        accumulate_grad_batches=parts,
        enable_checkpointing=save,
        strategy=STRATEGIES[strategy](),
        devices=1 if alone else 2,
        callbacks=callbacks,
    )
    rows = (SupervisedText if method == "sft" else TextPrompts)(train=data)
    run.fit(module, rows, ckpt_path=ckpt_path)
    names = {name for name, p in module.named_parameters() if p.requires_grad}
    end = dict(gathered(module, names))
    if run.is_global_zero:
        torch.save(end, at / "end.pt")
    metrics = {name: value for name, value in module.rollout_metrics.items() if not name.endswith("seconds")}
    return {"steps": run.global_step, "metrics": metrics}
