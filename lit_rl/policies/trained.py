"""Base of the policies around one transformer: trained whole or by LoRA, with a reference beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import nn

from lit_rl.checkpoints.layout import Geometry
from lit_rl.policies.weights.adapters import geometry
from lit_rl.policies.weights.lora import LoraSettings
from lit_rl.policies.weights.reference import ReferencedPolicy, reference_of


class TrainedPolicy(ReferencedPolicy):
    """A transformer whose every weight is trained, or low-rank adapters in it.

    Args:
        lora: Train low-rank adapters; None trains every weight of the network, which is then kept in float32.
        keep_reference: Keep a frozen copy that `reference()` answers with and `refresh_reference()` overwrites: of the whole network in a
            full fine-tune, of the adapter with LoRA. Without it the reference of LoRA is the base network; with `lora.initial`, whose
            adapter is part of the policy that starts, a copy is always kept.
    """

    def __init__(self, *, lora: LoraSettings | None, keep_reference: bool) -> None:
        keep_reference = keep_reference or (lora is not None and lora.initial is not None)
        super().__init__(reference_of(adapter=lora is not None, copied=keep_reference))
        self.lora, self.keep_reference = lora, keep_reference
        self.adapter: Geometry | None = None  # layers and strengths of the trained adapter, for checkpoints
        self.drops = False

    compile_blocks: bool | None = False
    """Blocks are compiled when they are read; None leaves that to `lit_rl.policies.by_device.settle`."""

    def compile_each(self, *, dynamic: bool) -> None:
        """`torch.compile` each block of each network.

        dynamic: Once for all shapes, else for each shape anew. Either way a resumed run rounds as one that was not interrupted, which
        torch's own choice, sizes that become dynamic when they change, does not promise.
        """
        for network in self.networks():
            for block in self.blocks(network):
                block.compile(dynamic=dynamic)

    @property
    def full(self) -> bool:
        """Every weight of the network is trained."""
        return self.lora is None

    def set_network(self, network: nn.Module, *, add: Callable[[LoraSettings], None], dtype: torch.dtype) -> None:
        """Train `network`, and keep its reference.

        add: Freezes it and adds the trained adapter, a new one or that of `lora.initial`. dtype: Precision of a frozen copy of the network.
        """
        self.network = network
        if self.lora:
            add(self.lora)
            self.adapter = geometry(network)
        else:
            network.requires_grad_(True)
        self.reference_weights.add(self, dtype=dtype)
        if size := self.reference_weights.bytes(self):
            from lightning.pytorch.utilities.rank_zero import rank_zero_info  # not before there is a model to read: it takes seconds

            rank_zero_info(f"Reference: a copy of what is trained, {size / 2**20:,.1f} MiB")

    def train(self, mode: bool = True) -> Self:
        """Training mode reaches the network only where a method sets `drops`.

        Everything else that depends on the mode (dropout of the model's settings or of adapters, layers left out, noise of routers, batch
        statistics) would make the policy that trains another one than the policy that sampled, and than its reference.
        """
        super().train(mode)
        if "network" in self._modules:
            for network in self.networks():
                network.train(mode and self.drops and network is self.network)
        return self

    def checkpoint_keys(self) -> set[str]:
        """Everything in a full fine-tune, its reference included; with LoRA all adapters, trained or not, without the base network."""
        keys = super().checkpoint_keys()
        return {key for key in keys if ".lora_" in key} if self.lora else keys
