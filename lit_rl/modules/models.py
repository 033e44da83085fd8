"""The life of the trained models: loading, and cutting into shards."""

from __future__ import annotations

from collections.abc import Sequence

import lightning as L
from lightning.pytorch.strategies import DeepSpeedStrategy, Strategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lit_rl.checkpoints.layout import Shardable
from lit_rl.policies.base import Policy
from lit_rl.policies.by_device import Place, settle
from lit_rl.policies.trained import TrainedPolicy
from lit_rl.strategies.checks import check_experts_reached
from lit_rl.strategies.fsdp2 import FSDP2Strategy


def place_of(trainer: L.Trainer) -> Place:
    """The device and the precision that a trainer computes with."""
    half = str(trainer.precision) in ("bf16-mixed", "16-mixed")
    fetches = isinstance(trainer.strategy, DeepSpeedStrategy) and trainer.strategy.zero_stage_3
    return Place(trainer.strategy.root_device, half=half, fetches=fetches)


def load_policy(policy: Policy, *, place: Place, drops: bool, training: bool, method: str) -> None:
    """Load the weights, choose what depends on the device, set dropout, and tell how much is trained.

    drops: dropout is active while the method trains.
    """
    policy.load()
    for sentence in settle(policy, place):
        rank_zero_info(sentence)
    if isinstance(policy, TrainedPolicy):
        policy.drops = drops
        if policy.lora and policy.lora.dropout and not drops and training:
            rank_zero_info(
                f"model.policy.lora.dropout={policy.lora.dropout:g} is not active in {method}, as no dropout is: the "
                "policy that trains must be the one that its reference and its old log-probabilities are of"
            )
    policy.train()  # from_pretrained leaves it in evaluation mode
    if training:
        trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
        rank_zero_info(f"Trained: {trained:,} of {sum(p.numel() for p in policy.parameters()):,} parameters of the policy")


def shard_models(strategy: Strategy, models: Sequence[Shardable]) -> None:
    """Under FSDP2 cut each block of each network, then the network. Other strategies need nothing here."""
    for model in models:
        for network in model.networks():
            check_experts_reached(strategy, network)
            if isinstance(strategy, FSDP2Strategy):
                strategy.shard(network, model.blocks(network))
