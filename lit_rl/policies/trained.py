"""What all policies around one transformer share: trained whole or by LoRA, and a reference beside it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import nn

from lit_rl.errors import ConfigError
from lit_rl.policies.base import Policy
from lit_rl.policies.weights.lora import TRAINED, LoraSettings, add_frozen_copy, copy_adapter, disabled_adapters, geometry, using_adapter
from lit_rl.policies.weights.shards import copy_weights, reshard

REFERENCE = "reference"


class TrainedPolicy(Policy):
    """A transformer whose every weight is trained, or low-rank adapters in it.

    Args:
        lora: Train low-rank adapters; None trains every weight of the network, which is then kept in float32.
        keep_reference: Keep a frozen copy that `reference()` answers with and `refresh_reference()` overwrites: of the whole network in a
            full fine-tune, of the adapter with LoRA. Without it the reference of LoRA is the base network; with `lora.initial`, whose
            adapter is part of the policy that starts, a copy is always kept.
    """

    def __init__(self, *, lora: LoraSettings | None, keep_reference: bool) -> None:
        super().__init__()
        self.lora = lora
        self.keep_reference = keep_reference or (lora is not None and lora.initial is not None)
        self.reference_network: nn.Module | None = None
        self.adapter: dict[str, Any] | None = None  # layers and strengths of the trained adapter, for checkpoints
        self._reference_answers = False
        self.has_reference = lora is not None or keep_reference
        self.drops = False

    @property
    def full(self) -> bool:
        """Whether every weight of the network is trained."""
        return self.lora is None

    def adopt(self, network: nn.Module, *, add: Callable[[LoraSettings], None], frozen: torch.dtype) -> None:
        """Take `network` as the one that is trained.

        add: freezes it and adds the trained adapter, a new one or that of `lora.initial`. frozen: precision of a reference network.
        """
        self.network = network
        if self.lora:
            add(self.lora)
            self.adapter = geometry(network)
            if self.keep_reference:
                add_frozen_copy(network, REFERENCE)
        else:
            network.requires_grad_(True)
            if self.keep_reference and self.full:
                self.reference_network = copy.deepcopy(network).requires_grad_(False).to(frozen)

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

    def networks(self) -> list[nn.Module]:
        """The trained network, and the frozen copy of it where one is kept: each is sharded on its own."""
        return [self.network] if self.reference_network is None else [self.network, self.reference_network]

    def answering(self) -> nn.Module:
        """The network that is asked at the moment."""
        return self.reference_network if self._reference_answers and self.reference_network is not None else self.network

    @contextmanager
    def reference(self) -> Iterator[None]:
        if self.lora:
            with using_adapter(self.network, REFERENCE) if self.keep_reference else disabled_adapters(self.network):
                yield
            return
        before, self._reference_answers = self._reference_answers, True
        try:
            yield
        finally:
            self._reference_answers = before

    def check_reference(self, *, after_warmup: bool) -> None:
        if not self.lora and not self.keep_reference:
            raise ConfigError("a full fine-tune has no reference weights: set model.policy.keep_reference to true, or model.kl_coef to 0")
        if after_warmup and not self.keep_reference:
            raise ConfigError(
                "LoRA's reference is the base from before the warm-up: set model.policy.keep_reference to true, or model.kl_coef to 0"
            )

    def refresh_reference(self) -> None:
        """The kept copy <- the current weights, e.g. when a warm-up ends; nothing where no copy is kept."""
        if not self.keep_reference:
            return
        if self.lora:
            reshard(self.network)
            copy_adapter(self.network, source=TRAINED, target=REFERENCE)
        elif self.reference_network is not None:
            copy_weights(self.network, self.reference_network)

    def checkpoint_keys(self) -> set[str]:
        """Everything in a full fine-tune, its reference included; with LoRA all adapters, trained or not, without the base network."""
        keys = super().checkpoint_keys()
        return {key for key in keys if ".lora_" in key} if self.lora else keys
