"""Refusals of settings under which a run would train something else than it says, before any model is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import lightning as L
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lit_rl.errors import ConfigError
from lit_rl.losses.step_surrogates import Clip


def check_callbacks(callbacks: Sequence[L.Callback]) -> None:
    """Raise ConfigError on those of Lightning that swap the weights that train, in checkpoints too."""
    for callback in callbacks:
        if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
            raise ConfigError(
                f"{type(callback).__name__} knows neither rollouts nor what a checkpoint of this project holds: use callbacks.ema.EMA "
                "in its place in trainer.callbacks"
            )


def check_trainer(trainer: L.Trainer, *, warmup: bool) -> None:
    """Raise ConfigError where the trainer's options cut rollouts or count optimizer steps in another way than the method."""
    if any(isinstance(callback, GradientAccumulationScheduler) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        raise ConfigError(
            "GradientAccumulationScheduler would change how many micro-batches make an optimizer step, which a rollout is cut by: take "
            "it out of trainer.callbacks"
        )
    if (trainer.gradient_clip_val or 0) < 0:  # Lightning takes it for "do not clip"
        raise ConfigError(f"trainer.gradient_clip_val={trainer.gradient_clip_val} must be positive; leave it out to clip nothing")
    if trainer.fast_dev_run:  # type: ignore[attr-defined]  # which sets the limits below for itself
        return
    limit, overfit = trainer.limit_train_batches, trainer.overfit_batches  # type: ignore[attr-defined]
    if overfit or limit != 1.0 or isinstance(limit, int):  # 1 is one batch, 1.0 all
        name = "overfit_batches" if overfit else "limit_train_batches"
        raise ConfigError(
            f"trainer.{name} would train a part of every rollout only: take it out; model.prompts_per_iteration makes an iteration "
            "smaller, and trainer.max_epochs a run shorter"
        )
    if trainer.max_steps != -1:
        raise ConfigError(
            "trainer.max_steps breaks the one-epoch-one-rollout scheme on resume: set trainer.max_epochs "
            f"(iterations{' + 1 for the warm-up' if warmup else ''}) and leave max_steps at -1"
        )


def check_precision(precision: str, dtype: torch.dtype) -> None:
    """Raise ConfigError on precisions that lose optimizer steps, or that differ from the policy's. dtype: of its frozen weights."""
    if precision in ("16-true", "bf16-true") or precision.startswith("transformer-engine"):
        half = "float16" if precision == "16-true" else "bfloat16"
        raise ConfigError(
            f"trainer.precision={precision} keeps what is trained in 16 bits, where an optimizer's small steps round to nothing: set "
            f"it to {'bf16' if half == 'bfloat16' else '16'}-mixed, which computes in 16 bits, and model.policy.dtype to {half} for "
            "frozen weights in 16 bits"
        )
    if {"16": torch.bfloat16, "bf16": torch.float16}.get(precision.removesuffix("-mixed")) == dtype:
        raise ConfigError(
            f"trainer.precision={precision} and model.policy.dtype={str(dtype).removeprefix('torch.')} are different "
            "16-bit formats, between which every layer would convert: set both to float16 (16-mixed) or to bfloat16 (bf16-mixed)"
        )


def check_at_least(minimum: int, **options: int | None) -> None:
    """Raise ConfigError on the first of the model's options that is below `minimum`; None is left alone."""
    for name, value in options.items():
        if value is not None and value < minimum:
            raise ConfigError(f"model.{name}={value} must be at least {minimum}")


def check_divides(processes: int, **options: int) -> None:
    """Raise ConfigError on the first of the model's options that does not divide among the processes."""
    for name, value in options.items():
        if value % processes:
            raise ConfigError(
                f"model.{name}={value} does not divide among {processes} processes; "
                f"use a multiple of {processes}, e.g. {-(-value // processes) * processes}"
            )


def tell_noise(method: L.LightningModule, metrics: Mapping[str, float], *, storage: torch.dtype) -> bool:
    """Warn where ratios of weights that have not moved yet are further from 1 than `Clip` allows: rounding decides what is trained.

    metrics: Of an iteration; `ratio_first_update_max_dev` is the largest |ratio - 1| then. Returns True where it has warned.
    """
    surrogate, deviation = getattr(method, "surrogate", None), metrics.get("ratio_first_update_max_dev", 0.0)
    if type(surrogate) is not Clip or not deviation > min(surrogate.low, surrogate.high):
        return False
    clip, precision = min(surrogate.low, surrogate.high), method.trainer.precision
    stored = str(storage).removeprefix("torch.")
    rank_zero_warn(
        f"Before any weight has moved, ratios are up to {deviation:.1e} from 1 (ratio_first_update_max_dev), and model.surrogate clips at "
        f"{clip:.1e}: rounding decides what is trained. "
        + ("" if storage == torch.float32 else f"Set model.storage_dtype to float32 (it is {stored}). ")
        + f"Widen low and high of model.surrogate, or compute in more bits (trainer.precision is {precision})"
    )
    return True


def refuse_no_rewards(who: str) -> None:
    """Raise ConfigError: a method that learns from rewards has none."""
    raise ConfigError(
        f"{who} learns from rewards, and the run has none: add {{class_path: "
        "callbacks.reward_scoring.RewardScoring, init_args: {rewards: {...}}} to trainer.callbacks"
    )
