"""The smallest complete run: a flow policy of two linear layers, a reward, a datamodule, a Trainer. For tests of everything but models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from callbacks.reward_scoring import RewardScoring
from datamodules.base import PromptDataModule
from lit_rl.losses.flow import FlowKL, VelocityKL
from lit_rl.losses.point_surrogates import NFT
from lit_rl.losses.step_surrogates import Clip, Guard
from lit_rl.methods.diffusion_nft import DiffusionNFT
from lit_rl.methods.flow_grpo import DanceGRPO, FlowGRPO, FlowGRPOFast, GRPOGuard
from lit_rl.modules.pictures import Evaluation
from lit_rl.modules.supervised import Supervised
from lit_rl.policies.base import FlowPolicy
from lit_rl.policies.weights.shards import copy_weights
from lit_rl.rewards.base import Reward
from lit_rl.samplers.flow import SDE
from lit_rl.samplers.points import Points
from lit_rl.samplers.schedules import Schedule, shifted_sigmas
from lit_rl.samplers.solvers import Sampler
from lit_rl.types import ALL, Cond, Info


class ToyPolicy(FlowPolicy):
    """v = f(x, t, prompt) on 2 x 2 one-channel "images"; the prompt's text is a number that chooses an embedding row."""

    def __init__(self, width: int = 16, dropout: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        self.width, self.dropout, self.seed = width, dropout, seed
        self.encoded: list[str] = []
        self.velocity_calls = 0

    def load(self) -> None:
        if hasattr(self, "network"):
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.network = nn.Sequential(
                nn.Sequential(nn.Linear(4 + 1 + 8, self.width), nn.SiLU(), nn.Dropout(self.dropout)), nn.Linear(self.width, 4)
            )
        self.frozen = deepcopy(self.network).requires_grad_(False)

    def networks(self) -> Sequence[nn.Module]:
        return [self.network, self.frozen]

    @contextmanager
    def reference(self) -> Iterator[None]:
        live, self.network = self.network, self.frozen
        try:
            yield
        finally:
            self.network = live

    def refresh_reference(self) -> None:
        copy_weights(self.network, self.frozen)

    def blocks(self, network: nn.Module) -> Sequence[nn.Module]:
        return [network[0]]  # type: ignore[index]

    def encode(self, prompts: Sequence[str]) -> Cond:
        self.encoded += prompts
        return {"embeds": torch.stack([torch.randn(8, generator=torch.Generator().manual_seed(int(p))) for p in prompts]).to(self.device)}

    def velocity(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        self.velocity_calls += 1
        return self.network(torch.cat([x.flatten(1), t[:, None], cond["embeds"]], 1)).view(x.shape).float()

    def decode(self, x: Tensor) -> Tensor:
        return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).expand(-1, 3, -1, -1)

    def encode_images(self, images: Tensor, info: Sequence[Info] = ()) -> Tensor:
        return images[:, :1].float() / 127.5 - 1

    def latent_shape(self) -> tuple[int, ...]:
        return (1, 2, 2)

    def sigmas(self, num_steps: int) -> Tensor:
        return shifted_sigmas(num_steps, shift=1.0)

    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        torch.save(weights, folder / "weights.pt")


class Brightness(Reward):
    """Mean pixel in [0, 1]: easy to raise, so a policy gradient of the right sign shows within a few iterations."""

    outputs = ("brightness",)

    highest = MappingProxyType({"brightness": 1.0})

    def score(self, media: Tensor, info: Sequence[Info]) -> Mapping[str, Tensor]:
        return {"brightness": media.double().flatten(1).mean(1) / 255}


class ToyData(PromptDataModule):
    """Prompts "0" ... ; the images to imitate are black."""

    def __init__(self, prompts: int = 6, held_out: int = 5, **kwargs: Any) -> None:
        rows = [MappingProxyType({"prompt": str(i)}) for i in range(prompts + held_out)]
        super().__init__(rows[:prompts], rows[prompts:], eval_batch_size=2, **kwargs)

    def examples(self, step: int, count: int, part: slice = ALL) -> tuple[Sequence[Info], Tensor]:
        rows = range(count)[part]
        return [self.train_prompts[i % len(self.train_prompts)] for i in rows], torch.zeros(len(rows), 3, 2, 2, dtype=torch.uint8)


PARTS: dict[str, tuple[str, str, type]] = {
    "warmup_steps": ("supervised", "warmup_steps", Supervised),
    "warmup_batch_size": ("supervised", "batch_size", Supervised),
    "warmup_lr": ("supervised", "warmup_lr", Supervised),
    "eval_num_steps": ("evaluation", "num_steps", Evaluation),
    "schedule_kind": ("schedule", "kind", Schedule),
    "schedule_shift": ("schedule", "shift", Schedule),
    "dynamics": ("sde", "dynamics", SDE),
    "noise_level": ("sde", "noise_level", SDE),
    "same_latent": ("sde", "same_latent", SDE),
    "clip_low": ("surrogate", "low", Clip),
    "clip_high": ("surrogate", "high", Clip),
    "kl_coef": ("kl", "coef", FlowKL),
    "kl_kind": ("kl", "kind", FlowKL),
}
"""The component of a flow method, its argument and its class, by the setting that tests give one by one."""

NFT_PARTS: dict[str, tuple[str, str, type]] = {
    "solver": ("sampler", "solver", Sampler),
    "eta": ("sampler", "eta", Sampler),
    "timesteps": ("points", "kind", Points),
    "timestep_fraction": ("points", "fraction", Points),
    "timestep_range": ("points", "range", Points),
    "timestep_shift": ("points", "shift", Points),
    "beta": ("surrogate", "beta", NFT),
    "adv_mode": ("surrogate", "mode", NFT),
    "kl_coef": ("kl", "coef", VelocityKL),
}
"""Those of DiffusionNFT, in place of others of the same name."""


SAMPLERS: dict[type[Any], dict[str, Any]] = {
    DanceGRPO: {"dynamics": "dance_sde", "noise_level": 0.3, "same_latent": True},
    FlowGRPOFast: {"dynamics": "cps", "noise_level": 0.8},
}
"""Samplers of relatives that differ from FlowGRPO's."""


def with_parts(cls: type[Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` with components of `cls` in the place of those in PARTS that are arguments of components."""
    known = PARTS | (NFT_PARTS if issubclass(cls, DiffusionNFT) else {})
    named = {name: known[name] for name in settings if name in known}
    parts: dict[str, dict[str, Any]] = {}
    for name, (part, argument, _) in named.items():
        parts.setdefault(part, {})[argument] = settings[name]
    if "supervised" in parts and not parts["supervised"].get("warmup_steps"):
        del parts["supervised"]
    classes = {part: kind for part, _, kind in known.values()} | ({"surrogate": Guard} if issubclass(cls, GRPOGuard) else {})
    own = next((sampler for relative, sampler in SAMPLERS.items() if issubclass(cls, relative)), {})
    if "sde" in parts:
        parts["sde"] = own | parts["sde"]
    rest = {name: value for name, value in settings.items() if name not in named}
    return {part: classes[part](**given) for part, given in parts.items()} | rest


CLIP = {"clip_low": 1e-2, "clip_high": 1e-2}


def toy_method(cls: type[Any] = FlowGRPO, *, lr: float = 1e-2, dropout: float = 0.0, **kwargs: Any) -> FlowGRPO:
    defaults: dict[str, Any] = dict(
        prompts_per_iteration=4, group_size=4, num_steps=4, eval_num_steps=4, rollout_micro_batch=6, warmup_batch_size=24,
        optimizer=lambda params: torch.optim.AdamW(params, lr=lr), **({} if issubclass(cls, DiffusionNFT) else CLIP),
    )  # fmt: skip
    return cls(ToyPolicy(dropout=dropout), **with_parts(cls, defaults | kwargs))


def toy_trainer(
    folder: Path,
    *,
    callbacks: Sequence[L.Callback] = (),
    rewards: Mapping[str, Reward] | None = None,
    weights: dict[str, float] | None = None,
    max_failed_fraction: float = 0.05,
    **kwargs: Any,
) -> L.Trainer:
    defaults: dict[str, Any] = dict(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        max_epochs=2, num_sanity_val_steps=0, limit_val_batches=0, default_root_dir=folder, log_every_n_steps=1,
    )  # fmt: skip
    scoring = RewardScoring(dict(rewards or {"brightness": Brightness()}), weights, max_failed_fraction)
    return L.Trainer(**(defaults | kwargs), callbacks=[scoring, *callbacks])


def toy_config(folder: Path, **model: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "policy": {"class_path": "toy.ToyPolicy"},
        "prompts_per_iteration": 4,
        "group_size": 4,
        "num_steps": 3,
        "evaluation": {"num_steps": 3},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-2}},
    }
    checkpoint = {"dirpath": str(folder / "checkpoints"), "filename": "{epoch}", "save_top_k": -1, "save_last": True}
    return {
        "seed_everything": 3,
        "model": {"class_path": "lit_rl.methods.flow_grpo.FlowGRPO", "init_args": settings | model},
        "data": {"class_path": "toy.ToyData"},
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 2,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "default_root_dir": str(folder),
            "callbacks": [
                {"class_path": "callbacks.reward_scoring.RewardScoring", "init_args": {"rewards": {"b": {"class_path": "toy.Brightness"}}}},
                {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": checkpoint},
            ],
        },
    }


def weights(method: FlowGRPO) -> Tensor:
    return torch.cat([p.detach().flatten() for p in method.policy.network.parameters()])


class Metrics(L.Callback):
    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.rows.append({k: float(v) for k, v in trainer.callback_metrics.items()})


class Impatient(L.Callback):
    """Once training has begun, waits for other processes for so long only: until then they may take their time to import everything."""

    def __init__(self, seconds: float) -> None:
        self.patience = timedelta(seconds=seconds)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        torch.distributed.distributed_c10d._set_pg_timeout(self.patience)


class Broken(Brightness):
    """Cannot score the samples of prompt "1"."""

    def score(self, media: Tensor, info: Sequence[Info]) -> Mapping[str, Tensor]:
        scores = super().score(media, info)["brightness"]
        return {"brightness": torch.where(torch.tensor([row["prompt"] == "1" for row in info]), torch.nan, scores)}
