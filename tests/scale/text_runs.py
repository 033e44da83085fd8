"""Runs of language models in the processes of a scale test: the same run in one process and in two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any
from zlib import crc32

import torch
from copies import every_step
from scenarios import STRATEGIES, held
from torch import Tensor
from toy_text import Digits, policy, trainer

from callbacks.ema import EMA
from callbacks.reward_scoring import RewardScoring
from callbacks.rng_state import RngState
from lit_rl.losses.kl import KL, RewardKL
from lit_rl.methods.dpo import DPO
from lit_rl.methods.grpo import DAPO, GRPO
from lit_rl.methods.gspo_mixed import MixedGSPO
from lit_rl.methods.ppo import PPO, CriticTraining
from lit_rl.methods.sft import SFT
from lit_rl.modules.dynamic import DynamicSampling
from lit_rl.policies.critic import Critic
from lit_rl.policies.weights.lora import LoraSettings
from lit_rl.policies.weights.shards import gathered
from lit_rl.rewards.base import TextReward
from lit_rl.rollouts.answers import Answers
from lit_rl.rollouts.base import Sampling
from lit_rl.types import Info

ADAM = partial(torch.optim.AdamW, lr=1e-2, eps=1e-3)  # with an eps of 1e-8 gradients of twice the size would train the same
PENALTY: dict[str, Any] = dict(kl_in_reward=RewardKL(coef=0.05, target=0.01, horizon=100))
ROWS: dict[str, Any] = dict(prompts_per_iteration=8, prompts_per_update=4, optimizer=ADAM)
ANSWERS: dict[str, Any] = ROWS | dict(group_size=4, answers=Answers(sampling=Sampling(max_new_tokens=6), chunk=5))
PARTS: dict[str, Any] = {"critic_training": CriticTraining, "dynamic_sampling": DynamicSampling}
METHODS: dict[str, Any] = {
    "sft": partial(SFT, **ROWS),
    "dpo": partial(DPO, **ROWS),
    "grpo": partial(GRPO, **ANSWERS, kl=KL(coef=0.1), entropy_coef=0.01),
    "ppo": partial(PPO, **ANSWERS, **PENALTY, critic_training=CriticTraining(lr=1e-2, warmup=1, gradient_clip_val=0.1)),
    "dapo": partial(DAPO, **ANSWERS, dynamic_sampling=DynamicSampling(prompts_per_generation=6, max_generations=20)),
    "gspo": partial(MixedGSPO, **ANSWERS),
}


class Odd(TextReward):
    """Nearly every answer to a prompt that begins with an odd digit earns something else; to the others they all earn 0."""

    outputs = ("odd",)

    def score(self, media: Sequence[str], info: Sequence[Info]) -> Mapping[str, Tensor]:
        return {"odd": torch.tensor([int(row["prompt"][0]) % 2 * crc32(t.encode()) / 2**30 for t, row in zip(media, info, strict=True)])}


class Rows(Digits):
    """Every row whose number does not divide by `pairs` is a pair where a method asks for the kind."""

    def __init__(self, pairs: int) -> None:
        super().__init__()
        kinds = ["self_play", *(["pair"] * (pairs - 1))]
        self.train_prompts = [MappingProxyType(dict(row) | {"kind": kinds[i % pairs]}) for i, row in enumerate(self.train_prompts)]


def fit(
    model: str,
    out: str,
    strategy: str,
    *,
    method: str,
    settings: dict[str, Any] | None = None,
    parts: int = 1,
    clip: float | None = 0.5,
    pairs: int = 2,
    lora: bool = False,
    save: bool = False,
    ckpt_path: str | None = None,
) -> dict[str, Any]:
    """Three iterations; every weight, whole, and the average of the policy's are written into out/end.pt."""
    torch.manual_seed(0)
    at = Path(out)
    at.mkdir(parents=True, exist_ok=True)
    adapter = LoraSettings(rank=4, alpha=16.0) if lora else None
    chosen = {name: PARTS[name](**value) for name, value in (settings or {}).items()}
    more = {"critic": Critic(lora=adapter, gradient_checkpointing=True)} if method == "ppo" else {}
    module = METHODS[method](policy(Path(model), lora=adapter, keep_reference=True, gradient_checkpointing=True), **more, **chosen)
    average = EMA(0.5)
    callbacks = [RewardScoring({"odd": Odd()}), average, RngState()]
    callbacks += [every_step(at)] if save else []
    run = trainer(
        max_epochs=3, limit_val_batches=0, accumulate_grad_batches=parts, gradient_clip_val=clip, enable_checkpointing=save,
        strategy=STRATEGIES[strategy](), devices=1 if strategy == "one" else 2, callbacks=callbacks,
    )  # fmt: skip
    run.fit(module, Rows(pairs), ckpt_path=ckpt_path)
    names = {name for name, _ in module.named_parameters()}
    end = {"weights": dict(gathered(module, names)), "average": average.averaged_weights(run, module)}
    if run.is_global_zero:
        torch.save(end, at / "end.pt")
    asked = sorted(set(module.rollout.group.tolist())) if module.rollout is not None else []
    metrics = {name: value for name, value in module.rollout_metrics.items() if not name.endswith("seconds")}
    here = sum(held(p) for p in module.parameters()) / sum(weight.numel() for weight in end["weights"].values())
    return {"steps": run.global_step, "groups": asked, "metrics": metrics, "held": here}
