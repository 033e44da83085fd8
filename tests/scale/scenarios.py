"""Functions that the processes of a scale test call: the same one runs in one process and in two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import lightning as L
import torch
import toy_text
from cpu_strategies import CPUZeroStrategy
from deepgen import deepgen_policy
from fill import FillData, fill_policy
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from toy import Brightness, ToyData, ToyPolicy, toy_trainer, with_parts

from callbacks.ema import EMA
from callbacks.export import Export
from callbacks.old_policy import OldPolicySync
from callbacks.reward_scoring import RewardScoring
from callbacks.rng_state import RngState
from datamodules.base import PromptDataModule
from datamodules.mixed import PromptsAndPairs
from datamodules.picture_sources import PictureSources, Source
from lit_rl.credit.advantage import Advantage
from lit_rl.errors import ConfigError
from lit_rl.losses.off_policy import Correction
from lit_rl.methods.diffusion_nft import DiffusionNFT
from lit_rl.methods.flow_grpo import FlowGRPO
from lit_rl.methods.grpo import GRPO
from lit_rl.methods.gspo_mixed import MixedGSPO
from lit_rl.modules.supervised import Supervised
from lit_rl.policies.base import FlowPolicy
from lit_rl.policies.sd3 import SD3Policy
from lit_rl.policies.weights.lora import LoraSettings
from lit_rl.policies.weights.shards import gathered
from lit_rl.rewards.base import Reward, TextReward
from lit_rl.rollouts.answers import Answers
from lit_rl.rollouts.base import Request, Sampling
from lit_rl.rollouts.http import HTTPEngine
from lit_rl.rollouts.native import NativeEngine
from lit_rl.strategies.fsdp2 import FSDP2Strategy
from lit_rl.types import ALL, Info, TokenRollout

STRATEGIES = {
    "one": lambda: "auto",
    "ddp": lambda: "ddp",
    "fsdp2": FSDP2Strategy,
    "fsdp2-file": partial(FSDP2Strategy, save_distributed_checkpoint=False),
    "fsdp2-bf16": partial(FSDP2Strategy, gather_dtype="bfloat16"),
    "zero1": partial(CPUZeroStrategy, stage=1),
    "zero2": partial(CPUZeroStrategy, stage=2),
    "zero3": partial(CPUZeroStrategy, stage=3),
    "zero3, nothing kept": partial(CPUZeroStrategy, stage=3, reuse=0),
    "zero3-offload": partial(CPUZeroStrategy, stage=3, offload_optimizer=True, offload_parameters=True),
}


class Contrast(Reward):
    outputs = ("contrast",)

    def score(self, media: Tensor, info: Sequence[Info]) -> Mapping[str, Tensor]:
        return {"contrast": media.double().flatten(1).std(1) / 255}


class Long(TextReward):
    outputs = ("long",)

    def score(self, media: Sequence[str], info: Sequence[Info]) -> Mapping[str, Tensor]:
        return {"long": torch.tensor([float(len(text)) for text in media])}


class Said(PromptDataModule):
    """Two-digit prompts for the miniature pipelines; the images to imitate are striped."""

    def __init__(self) -> None:
        rows = [MappingProxyType({"prompt": f'say "{i}{i}"'}) for i in range(6)]
        super().__init__(rows[:4], rows[4:], eval_batch_size=1)

    def examples(self, step: int, count: int, part: slice = ALL) -> tuple[Sequence[Info], Tensor]:
        images = torch.arange(count * 3 * 16 * 24).view(count, 3, 16, 24) * 37 % 256
        return [self.train_prompts[i % 4] for i in range(count)][part], images[part].to(torch.uint8)


def policy(
    settings: dict[str, Any] | None, fill: dict[str, Any] | None, dropout: float, deepgen: dict[str, Any] | None = None
) -> FlowPolicy:
    if deepgen is not None:
        return deepgen_policy(Path(deepgen["folder"]), **{name: value for name, value in deepgen.items() if name != "folder"})
    if fill is not None:
        return fill_policy(Path(fill["folder"]), **{name: value for name, value in fill.items() if name != "folder"})
    if settings is None:
        return ToyPolicy(dropout=dropout)
    lora = settings.get("lora")
    return SD3Policy(
        **(settings | {"lora": LoraSettings(**lora) if lora else None}), resolution=(16, 24), guidance_scale=2.0, max_sequence_length=8
    )


def method(
    settings: dict[str, Any],
    sd3: dict[str, Any] | None,
    fill: dict[str, Any] | None = None,
    deepgen: dict[str, Any] | None = None,
) -> FlowGRPO | DiffusionNFT:
    adam = partial(torch.optim.AdamW, lr=1e-2, eps=1e-3)  # with an eps of 1e-8 gradients of twice the size would train the same
    chosen = getattr(torch.optim, settings["optimizer"]) if "optimizer" in settings else adam
    defaults: dict[str, Any] = dict(
        prompts_per_iteration=4, group_size=4, num_steps=4, eval_num_steps=2, rollout_micro_batch=6, clip_low=1e-2, clip_high=1e-2,
        warmup_steps=2, warmup_batch_size=8, inner_epochs=2, updates_per_iteration=4, kl_coef=0.1,
    )  # fmt: skip
    if sd3 or fill or deepgen:  # each pair once: their passes take a hundred times as long as the toy's
        defaults |= dict(num_steps=3, inner_epochs=1, updates_per_iteration=2)
    settings = defaults | settings | {"optimizer": chosen}
    dropout = settings.pop("dropout", 0.0)
    settings["advantage"] = Advantage(**settings.get("advantage", {}))
    if aux := settings.pop("aux", None):
        pictures = PictureSources([Source(path=aux["sources"])], size=16, multiple=8)
        settings["supervised"] = Supervised(**{name: value for name, value in aux.items() if name != "sources"}, data=pictures)
    nft = settings.pop("nft", None)
    if nft is None:
        return FlowGRPO(policy(sd3, fill, dropout, deepgen), **with_parts(FlowGRPO, settings))
    clips = ("clip_low", "clip_high")
    kept = {name: value for name, value in settings.items() if name not in clips}
    return DiffusionNFT(policy(sd3, fill, dropout, deepgen), **with_parts(DiffusionNFT, kept | nft))


def trainer(folder: Path, strategy: str, settings: dict[str, Any], callbacks: Sequence[L.Callback] = ()) -> L.Trainer:
    rewards: dict[str, Reward] = {"brightness": Brightness(), "contrast": Contrast()}
    chosen: str | Strategy = STRATEGIES[strategy]()
    devices = 1 if strategy == "one" else 2
    defaults: dict[str, Any] = dict(accumulate_grad_batches=2, gradient_clip_val=0.2, max_epochs=3, limit_val_batches=1.0)
    return toy_trainer(
        folder, callbacks=[*callbacks, RngState()], rewards=rewards, weights={"brightness": 1.0, "contrast": 0.5},
        strategy=chosen, devices=devices, **(defaults | settings),
    )  # fmt: skip


def fit(
    folder: str,
    strategy: str,
    *,
    method_args: dict[str, Any],
    trainer_args: dict[str, Any] | None = None,
    sd3: dict[str, Any] | None = None,
    fill: dict[str, Any] | None = None,
    deepgen: dict[str, Any] | None = None,
    save: dict[str, Any] | None = None,
    export: bool = False,
    old: dict[str, Any] | None = None,
    ckpt_path: str | None = None,
) -> dict[str, Any]:
    """Train and write every weight, whole, and everything else that runs are compared by into folder/end.pt."""
    torch.manual_seed(0)
    at = Path(folder)
    at.mkdir(parents=True, exist_ok=True)
    average = EMA(0.9)
    old_policy = OldPolicySync(**old) if old else None
    callbacks: list[L.Callback] = [average, *([old_policy] if old_policy else [])]
    callbacks += [Export(str(at / "export"))] if export else []
    callbacks += [ModelCheckpoint(dirpath=at, save_top_k=-1, filename="{epoch}-{step}", **save)] if save else []
    module = method(method_args, sd3, fill, deepgen)
    before = parameters(module)
    run = trainer(at, strategy, dict(enable_checkpointing=save is not None) | (trainer_args or {}), callbacks)
    run.fit(module, FillData() if fill else Said() if sd3 or deepgen else ToyData(), ckpt_path=ckpt_path)
    end = {
        "weights": dict(gathered(module.policy, {name for name, _ in module.policy.named_parameters()})),
        "average": average.averaged_weights(run, module),
        "tracker": module.tracker.state_dict() if module.tracker else {},
        "trained": [name for name, _ in module.policy.trainable()],
        "validated": float(run.callback_metrics["val/brightness"]),
        "old": old_policy.old_weights(run, module) if old_policy else {},
    }
    if run.is_global_zero:
        torch.save(end, at / "end.pt")
    return {"steps": run.global_step, "held": sum(held(p) for p in module.policy.network.parameters()) / before}


def parameters(module: FlowGRPO | DiffusionNFT) -> int:
    """Numbers in the trained network of one process without sharding."""
    module.policy.load()
    return sum(p.numel() for p in module.policy.network.parameters())


def held(parameter: Tensor) -> int:
    """Numbers that this process holds of a parameter between two steps."""
    from torch.distributed.tensor import DTensor

    if isinstance(parameter, DTensor):
        return parameter.to_local().numel()
    return getattr(parameter, "ds_tensor", parameter).numel()


def answers(
    folder: str,
    strategy: str,
    *,
    lora: bool,
    precision: str = "32-true",
    http: dict[str, Any] | None = None,
    asynchronous: bool = False,
    more: Sequence[int] = (),
) -> list[dict[str, Any]]:
    """Two iterations of GRPO on a miniature language model: what this process's engine answered, and what the trainer says of it.

    more: After each, so many requests of the first process, of the second, ... in one call: what it answered to those.
    """
    torch.manual_seed(0)
    engine = NativeEngine(batch=6) if http is None else HTTPEngine(**http)
    settings: dict[str, Any] = {"lora": LoraSettings(rank=4, alpha=16.0)} if lora else {}
    found: list[dict[str, Any]] = []

    class Watch(L.Callback):
        def on_rollout_end(self, trainer: L.Trainer, module: GRPO, rollout: TokenRollout) -> None:
            with trainer.precision_plugin.forward_context():
                own = module.all_logprobs(rollout, temperature=0.8)
            ids = [tokens[:length].tolist() for tokens, length in zip(rollout.tokens, rollout.lengths)]
            apart = (own - rollout.logprobs).abs()[rollout.mask]
            found.append({"ids": ids, "group": rollout.group.tolist(), "apart": float(apart.max()), "mean": float(apart.mean())})
            if more:
                first = sum(more[: trainer.global_rank])
                last = first + more[trainer.global_rank] if trainer.world_size > 1 else sum(more)
                wanted = [Request(range(2, 4 + i % 3), (7, i)) for i in range(first, last)]
                found[-1]["more"] = [answer.ids for answer in module.answers.engine.generate(wanted, module.answers.sampling)]

    module = GRPO(
        toy_text.policy(Path(folder), **settings), prompts_per_iteration=4, group_size=4, seed=0,
        optimizer=partial(torch.optim.SGD, lr=30.0),
        answers=Answers(engine=engine, sampling=Sampling(max_new_tokens=8, temperature=0.8), chunk=5, asynchronous=asynchronous),
        correction=Correction() if asynchronous else None,
    )  # fmt: skip
    run = L.Trainer(
        accelerator="cpu", strategy=STRATEGIES[strategy](), devices=1 if strategy == "one" else 2, max_epochs=2, precision=precision,  # type: ignore[arg-type]
        callbacks=[RewardScoring({"long": Long()}), Watch()], limit_val_batches=0, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    run.fit(module, toy_text.Digits())
    return found


def mixed(folder: str, strategy: str, *, train: str, val: str) -> dict[str, float]:
    """The metrics of an iteration of self-play and preferences, and of the held-out rows after it."""
    torch.manual_seed(0)
    module = MixedGSPO(
        toy_text.policy(Path(folder), keep_reference=True), group_size=3,
        answers=Answers(sampling=Sampling(max_new_tokens=4, temperature=0.8)),
        prompts_per_iteration=4, optimizer=partial(torch.optim.SGD, lr=0.5), seed=0,
    )  # fmt: skip
    run = toy_text.trainer(
        strategy=STRATEGIES[strategy](), devices=1 if strategy == "one" else 2, max_epochs=1, callbacks=[RewardScoring({"long": Long()})],
    )  # fmt: skip
    run.fit(module, PromptsAndPairs(train=train, val=val, shuffle=False, eval_batch_size=1))
    return {name: float(value) for name, value in run.callback_metrics.items() if name.startswith(("val/", "dpo/", "reward_"))}


def fails(**arguments: Any) -> str:
    """The error of a `fit` that must not start."""
    try:
        fit(**arguments)
    except ConfigError as error:
        return str(error)
    raise AssertionError("it started")
