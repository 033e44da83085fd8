"""Refusals of strategies under which something else would run than what was asked for."""

from __future__ import annotations

from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch import nn

from lit_rl.errors import ConfigError
from lit_rl.policies.weights.adapters import adapted_parameters
from lit_rl.strategies.fsdp2 import FSDP2Strategy
from lit_rl.strategies.zero import ZeroStrategy


def check_strategy(strategy: Strategy) -> None:
    """Raise ConfigError for strategies under which a rollout fails, nothing is sharded, or checkpoints cannot be read again."""
    advice = ""
    if isinstance(strategy, ModelParallelStrategy | FSDPStrategy) and not isinstance(strategy, FSDP2Strategy):
        advice = "lit_rl.strategies.fsdp2.FSDP2Strategy, e.g. by --config configs/base/fsdp.yaml before the run's own"
    if isinstance(strategy, DeepSpeedStrategy) and not isinstance(strategy, ZeroStrategy):
        advice = "lit_rl.strategies.zero.ZeroStrategy, e.g. by --config configs/base/deepspeed_zero2.yaml before the run's own"
    if advice:
        raise ConfigError(f"trainer.strategy={type(strategy).__name__} is not supported here: use {advice}")


def check_experts_reached(strategy: Strategy, network: nn.Module) -> None:
    """Raise ConfigError if adapters of parameters, which read them outside of the layer's forward, would find them partitioned."""
    if isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3 and (names := adapted_parameters(network)):
        raise ConfigError(
            f"lora.targets: {len(names)} parameters such as {names[0]} are adapted, which ZeRO-3 keeps partitioned while PEFT adds the "
            "adapters to them: train with --config configs/base/fsdp.yaml or deepspeed_zero2.yaml, or name targets without experts"
        )


def check_swaps_reach(strategy: Strategy, *, who: str) -> None:
    """Raise ConfigError if weights that are swapped in place would be missed by the next forward. who: what swaps them."""
    if not isinstance(strategy, DeepSpeedStrategy) or not strategy.zero_stage_3:
        return
    assert isinstance(strategy.config, dict)
    threshold = strategy.config["zero_optimization"].get("stage3_param_persistence_threshold")
    if threshold != 0:
        raise ConfigError(
            f"{who} under ZeRO-3 needs zero_optimization.stage3_param_persistence_threshold: 0 in the DeepSpeed config "
            f"(it is {'not set' if threshold is None else threshold}): weights that stay gathered would not see the swap"
        )
