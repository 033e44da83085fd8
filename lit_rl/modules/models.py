"""The life of the trained models: loading, and cutting into shards."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lit_rl.checkpoints.layout import Shardable
from lit_rl.policies.base import Policy
from lit_rl.policies.trained import TrainedPolicy
from lit_rl.strategies.checks import check_experts_reached
from lit_rl.strategies.fsdp2 import FSDP2Strategy


def load_policy(policy: Policy, *, drops: bool, training: bool, method: str) -> None:
    """Load the weights, set dropout, and tell how much is trained. drops: dropout is active while the method trains."""
    policy.load()
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
