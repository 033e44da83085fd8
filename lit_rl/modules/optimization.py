"""An optimizer and its schedule from a run's options, checked before any model is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import isfinite
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR, ReduceLROnPlateau, SequentialLR

from lit_rl.errors import ConfigError
from lit_rl.modules.meters import Meters
from lit_rl.modules.supervised import Supervised, warmup_factor
from lit_rl.policies.base import Policy


def configured(optimizer: Optimizer, lr_scheduler: LRSchedulerCallable | None, supervised: Supervised | None) -> dict[str, Any]:
    """The mapping that Lightning's `configure_optimizers` returns."""
    use_fused(optimizer)
    schedule = build_schedule(optimizer, lr_scheduler, supervised)
    if schedule is None:
        return {"optimizer": optimizer}
    if isinstance(schedule, ReduceLROnPlateau):
        return {"optimizer": optimizer, "lr_scheduler": plateau(schedule, supervised)}
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def parameter_groups(policy: Policy) -> list[nn.Parameter] | list[dict[str, object]]:
    """The trained parameters of a policy, in groups where some have a learning rate of their own."""
    rates, trained = policy.learning_rates(), list(policy.trainable())
    if not rates:
        return [p for _, p in trained]
    own = {start: [p for name, p in trained if name.startswith(start)] for start in rates}
    rest = [p for name, p in trained if not name.startswith(tuple(rates))]
    groups: list[dict[str, object]] = [{"params": rest}] if rest else []
    return groups + [{"params": own[start], "lr": rate} for start, rate in rates.items() if own[start]]


def use_fused(optimizer: Optimizer, *, device: str = "cuda") -> None:
    """Have an optimizer of torch make its step in one kernel where all its weights are on `device` and the run says nothing of how.

    The step is the same up to rounding. torch's own choice on a GPU, `foreach`, needs memory for a copy of the weights beside it.
    """
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    if not all(p.device.type == device and p.is_floating_point() for p in weights):
        return
    for group in optimizer.param_groups:
        if {"fused", "foreach"} <= group.keys() and group["fused"] is None and group["foreach"] is None and not group["differentiable"]:
            group["fused"] = True


def build_schedule(
    optimizer: Optimizer, lr_scheduler: LRSchedulerCallable | None, supervised: Supervised | None
) -> LRScheduler | ReduceLROnPlateau | None:
    """`lr_scheduler`, after that of a warm-up."""
    after = lr_scheduler(optimizer) if lr_scheduler else None
    steps = supervised.warmup_steps if supervised else 0
    if supervised is None or not steps or isinstance(after, ReduceLROnPlateau):
        return after  # type: ignore[return-value]
    peak = 1.0 if supervised.warmup_lr is None else supervised.warmup_lr / optimizer.param_groups[0]["lr"]
    schedule = LambdaLR(optimizer, lambda step: peak * warmup_factor(step, steps=steps) if step < steps else 1.0)
    return schedule if after is None else SequentialLR(optimizer, [schedule, after], milestones=[steps])  # type: ignore[list-item]


def plateau(scheduler: ReduceLROnPlateau, supervised: Supervised | None) -> dict[str, Any]:
    """Lightning's entry for a schedule that is asked once per iteration, where its metric is there."""
    metric = getattr(scheduler, "monitor", None)
    if metric is None or (supervised and supervised.warmup_steps):
        raise ValueError(
            "ReduceLROnPlateau waits for a metric, which a supervised warm-up has not: use {class_path: lightning.pytorch.cli."
            "ReduceLROnPlateau, init_args: {monitor: reward_mean, mode: max}} without model.supervised.warmup_steps, or another"
        )
    return {"scheduler": scheduler, "monitor": metric, "interval": "epoch", "strict": False}


def check_optimizer(optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable | None, supervised: Supervised | None) -> None:
    """Raise ConfigError on settings that the optimizer or the schedule refuses, by building them once for a single weight."""
    name = "optimizer"
    try:
        trial = optimizer([nn.Parameter(torch.zeros(1, 1))])
        name = "lr_scheduler"
        schedule = lr_scheduler(trial) if lr_scheduler is not None else None
        if isinstance(schedule, ReduceLROnPlateau):
            plateau(schedule, supervised)
        elif schedule is not None:
            trial.step()
            schedule.step()  # some look at their settings only then
    except (ValueError, TypeError, ArithmeticError) as error:
        raise ConfigError(f"model.{name}: {error}") from error


def check_length(optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable | None, *, steps: int, max_epochs: int) -> None:
    """Raise ConfigError where a schedule of a fixed length is shorter than the `steps` optimizer steps of the run after its warm-up."""
    schedule = lr_scheduler(optimizer([nn.Parameter(torch.zeros(1, 1))])) if lr_scheduler else None
    if isinstance(schedule, OneCycleLR) and schedule.total_steps < steps:
        raise ConfigError(
            f"model.lr_scheduler: OneCycleLR ends after total_steps={schedule.total_steps} optimizer steps, and this run has {steps} "
            f"(trainer.max_epochs={max_epochs}): set total_steps to {steps}"
        )


def forget_moments(optimizers: Sequence[Optimizer]) -> None:
    """Set the moments of the first optimizer to 0: supervised gradients are orders of magnitude larger than a policy gradient."""
    for state in optimizers[0].state.values():
        for name, value in state.items():
            state[name] = value.zero_() if isinstance(value, Tensor) else 0  # DeepSpeed's Adam counts its steps in an int


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor | None:
    """L2 norm of all gradients, whole under FSDP2 too; None where there is none here: DeepSpeed keeps gradients to itself."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return None
    norm = nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def leave_out_not_finite(module: L.LightningModule, meters: Meters) -> None:
    """Meter the norm of an optimizer step's gradient, or take the gradient away if it is not finite: it would end in every weight."""
    norm = gradient_norm(module.parameters())
    if norm is None:
        return
    if isfinite(value := float(norm)):
        meters.mean({"grad_norm": value})
    else:
        module.zero_grad()
        meters.count("skipped_steps")
        rank_zero_warn(
            f"Optimizer step {module.trainer.global_step + 1} is left out: its gradient is not finite. If that goes on, lower the learning "
            "rate, and look at the last answers and rewards"
        )
