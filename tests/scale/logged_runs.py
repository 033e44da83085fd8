"""Runs whose logs are compared: the same run in one process and in several, under any progress bar."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import toy_text
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from scenarios import Long
from toy import Brightness, ToyData, toy_method, with_parts

from callbacks.old_policy import OldPolicySync
from callbacks.progress import Progress
from callbacks.reward_scoring import RewardScoring
from callbacks.throughput import Throughput
from lit_rl.losses.kl import KL
from lit_rl.methods.diffusion_nft import DiffusionNFT
from lit_rl.methods.grpo import GRPO
from lit_rl.policies.causal_lm import CausalLM
from lit_rl.rollouts.answers import Answers
from lit_rl.rollouts.base import Sampling
from lit_rl.strategies.fsdp2 import FSDP2Strategy

BARS = {"tqdm": TQDMProgressBar, "rich": RichProgressBar, "ours": Progress}


class OnFirst(L.Callback):
    """Reads everything, everywhere, on one process alone: a collective in a property would hang or end the run."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def look(self, trainer: L.Trainer) -> dict[str, float]:
        if not trainer.is_global_zero:
            return {}
        _ = dict(trainer.progress_bar_metrics), dict(trainer.logged_metrics)
        return {name: float(value) for name, value in trainer.callback_metrics.items()}

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.look(trainer)

    def on_validation_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.look(trainer)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.look(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.rows.append(self.look(trainer))


def method(kind: str, model: str | None, size: int | None) -> Any:
    sgd = partial(torch.optim.SGD, lr=0.5)
    if kind == "grpo":
        return GRPO(
            CausalLM(str(model), keep_reference=True), prompts_per_iteration=6, prompts_per_update=6,
            answers=Answers(sampling=Sampling(max_new_tokens=6)),
            group_size=4, kl=KL(coef=0.1), entropy_coef=0.01, inner_epochs=2, optimizer=sgd, seed=0,
        )  # fmt: skip
    settings: dict[str, Any] = dict(prompts_per_iteration=6, updates_per_iteration=7, warmup_steps=2, warmup_batch_size=7, kl_coef=0.1)
    flow = toy_method(**settings, train_micro_batch=size, optimizer=sgd)
    if kind == "flow":
        return flow
    return DiffusionNFT(
        flow.policy, **with_parts(DiffusionNFT, settings), group_size=4, num_steps=4, rollout_micro_batch=6,
        train_micro_batch=size, optimizer=sgd,
    )  # fmt: skip


def fit(folder: str, *, kind: str = "flow", bar: str = "tqdm", strategy: str = "ddp", size: int | None = None, model: str | None = None,
        parts: int = 1) -> dict[str, Any]:  # fmt: skip
    """The first process's metrics at the end of each epoch, its CSV file's rows, and the weights at the end."""
    torch.manual_seed(0)
    devices = int(os.environ.get("WORLD_SIZE", "1"))
    watch, at = OnFirst(), Path(folder)
    rewards = {"long": Long()} if kind == "grpo" else {"brightness": Brightness()}
    callbacks: list[L.Callback] = [
        BARS[bar](), watch, Throughput(), RewardScoring(rewards),
        EarlyStopping("loss", patience=9, strict=False, check_on_train_epoch_end=True),
        EarlyStopping(f"val/{next(iter(rewards))}", mode="max", patience=9),
        ModelCheckpoint(dirpath=at / "best", monitor="grad_norm", mode="min", save_on_train_epoch_end=True, filename="{epoch}"),
    ]  # fmt: skip
    callbacks += [OldPolicySync("slow")] if kind == "nft" else []
    chosen: Any = "auto" if devices == 1 else FSDP2Strategy(save_distributed_checkpoint=False) if strategy == "fsdp2" else "ddp"
    run = L.Trainer(
        accelerator="cpu", devices=devices, strategy=chosen, max_epochs=3, callbacks=callbacks, check_val_every_n_epoch=1,
        logger=CSVLogger(at, name="csv", version=""), num_sanity_val_steps=1, log_every_n_steps=1, enable_model_summary=False,
        accumulate_grad_batches=parts,
    )  # fmt: skip
    learner = method(kind, model, size)
    run.fit(learner, toy_text.Digits() if kind == "grpo" else ToyData())
    weights = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in learner.parameters()]
    numbers = torch.cat([p.detach().flatten() for p in weights])
    return {"rows": watch.rows, "steps": run.global_step, "weights": numbers.tolist()}
