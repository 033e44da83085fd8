"""A policy with a reference beside the weights that are trained: four ways to keep one, and the case without.

A `Reference` is chosen when the policy is constructed, before any weights are read, and gets its weights when they are loaded.

| class | reference | memory | after a warm-up |
| --- | --- | --- | --- |
| `AdapterOff` | the base network, its adapters switched off | none | stays the base from before it |
| `FrozenAdapter` | a second adapter in the same base | the adapter again, in float32 | becomes the current adapter |
| `FrozenNetwork` | a copy of the network | all its weights in the policy's `dtype` | becomes the current weights |
| `lit_rl.policies.style` | the style adapter switched off, or a copy of it | none, or that adapter again | stays, or becomes current |
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from lit_rl.errors import ConfigError
from lit_rl.policies.base import Policy
from lit_rl.policies.weights.adapters import TRAINED, adapter_parameters, add_frozen_copy, copy_adapter, tuner_layers
from lit_rl.policies.weights.shards import copy_weights, reshard

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

REFERENCE = "reference"
"""Name of the frozen adapter."""


class Referenced(Protocol):
    """A policy, or a part of one, as its reference sees it: the trained network, a frozen one, and the name of the one that is called."""

    network: nn.Module
    reference_network: nn.Module | None
    called: str


class ReferencedPolicy(Policy):
    """A policy whose reference is one of the classes below."""

    def __init__(self, reference: Reference) -> None:
        super().__init__()
        self.reference_weights = reference
        self.reference_network: nn.Module | None = None
        self.called = "network"  # the name of the network that a forward calls

    @property
    def active_network(self) -> nn.Module:
        """The network to call: inside `reference()` the frozen copy where one is kept, else the trained one."""
        return getattr(self, self.called)

    def networks(self) -> Sequence[nn.Module]:
        """The trained network, and the frozen copy of it where one is kept: each is sharded on its own."""
        return [self.network] if self.reference_network is None else [self.network, self.reference_network]

    @property
    def has_reference(self) -> bool:
        """`reference()` has weights to answer with."""
        return self.reference_weights.exists

    def reference(self) -> AbstractContextManager[None]:
        """Inside it the reference answers."""
        return self.reference_weights.active(self)

    def check_reference(self, *, after_warmup: bool) -> None:
        """Raise ConfigError where the reference has no weights, or those from before a warm-up."""
        self.reference_weights.check(after_warmup=after_warmup)

    def refresh_reference(self) -> None:
        """A kept copy <- the current weights; nothing where none is kept."""
        self.reference_weights.refresh(self)


class Reference:
    """Weights that answer inside `active(policy)`."""

    exists = True
    """False where a policy has no weights to answer with."""

    def add(self, policy: Referenced, *, dtype: torch.dtype) -> None:
        """Called once when the policy's weights are read. dtype: precision of the policy's frozen weights."""

    def active(self, policy: Referenced) -> AbstractContextManager[None]:
        """Inside it the reference answers in place of the trained weights."""
        raise NotImplementedError

    def refresh(self, policy: Referenced) -> None:
        """The reference <- the current weights, in place, shard by shard; nothing where no copy is kept."""

    def check(self, *, after_warmup: bool) -> None:
        """Raise ConfigError if there are no weights to answer with, or, after a warm-up, those from before it."""

    def bytes(self, policy: Referenced) -> int:
        """Memory of the reference's own weights, before a strategy shards them."""
        return 0


class NoReference(Reference):
    """A full fine-tune without a copy of its initial weights."""

    exists = False

    @contextmanager
    def active(self, policy: Referenced) -> Iterator[None]:
        """The trained weights answer."""
        yield

    def check(self, *, after_warmup: bool) -> None:
        """Raise ConfigError: there is no reference."""
        raise ConfigError("a full fine-tune has no reference weights: set model.policy.keep_reference to true, or model.kl.coef to 0")


class AdapterOff(Reference):
    """LoRA's base network. It needs no memory and cannot be refreshed."""

    layers: Sequence[LoraLayer]

    def add(self, policy: Referenced, *, dtype: torch.dtype) -> None:
        """Note which layers have adapters."""
        self.layers = tuner_layers(policy.network)

    def active(self, policy: Referenced) -> AbstractContextManager[None]:
        """Inside it the base network answers."""
        return switched(self.layers, "_disable_adapters", True)

    def check(self, *, after_warmup: bool) -> None:
        """Raise ConfigError after a warm-up, which the base has not seen."""
        if after_warmup:
            raise ConfigError(
                "LoRA's reference is the base from before the warm-up: set model.policy.keep_reference to true, or model.kl.coef to 0"
            )


class FrozenAdapter(Reference):
    """A frozen copy of the trained adapter beside it, in float32. The base network is shared."""

    layers: Sequence[LoraLayer]

    def add(self, policy: Referenced, *, dtype: torch.dtype) -> None:
        """Copy the trained adapter, the one of `lora.initial` included."""
        add_frozen_copy(policy.network, REFERENCE)
        self.layers = tuner_layers(policy.network)

    def active(self, policy: Referenced) -> AbstractContextManager[None]:
        """Inside it the frozen adapter answers."""
        return switched(self.layers, "_active_adapter", [REFERENCE])

    def refresh(self, policy: Referenced) -> None:
        """The frozen adapter <- the trained one."""
        reshard(policy.network)
        copy_adapter(policy.network, source=TRAINED, target=REFERENCE)

    def bytes(self, policy: Referenced) -> int:
        """The adapter again, in float32."""
        return sum(p.nbytes for p in adapter_parameters(policy.network, REFERENCE).values())


class FrozenNetwork(Reference):
    """A frozen copy of the whole network, `policy.reference_network`, in the precision of the policy's frozen weights."""

    def add(self, policy: Referenced, *, dtype: torch.dtype) -> None:
        """Copy the network."""
        policy.reference_network = copy.deepcopy(policy.network).requires_grad_(False).to(dtype)

    @contextmanager
    def active(self, policy: Referenced) -> Iterator[None]:
        """Inside it the copy is called in place of the trained network."""
        before, policy.called = policy.called, "reference_network"
        try:
            yield
        finally:
            policy.called = before

    def refresh(self, policy: Referenced) -> None:
        """The copy <- the trained network."""
        copy_weights(policy.network, self._frozen(policy))

    def bytes(self, policy: Referenced) -> int:
        """The network again, in the precision of frozen weights."""
        return sum(p.nbytes for p in self._frozen(policy).parameters())

    def _frozen(self, policy: Referenced) -> nn.Module:
        assert policy.reference_network is not None, "the copy is made when the policy is loaded"
        return policy.reference_network


class Combined(Reference):
    """References of several parts of one network, e.g. of a style adapter and of LoRA; the first one decides in `check`."""

    def __init__(self, *parts: Reference) -> None:
        self.parts = parts

    def add(self, policy: Referenced, *, dtype: torch.dtype) -> None:
        """Add every part."""
        for part in self.parts:
            part.add(policy, dtype=dtype)

    @contextmanager
    def active(self, policy: Referenced) -> Iterator[None]:
        """Inside it every part is active."""
        with ExitStack() as stack:
            for part in self.parts:
                stack.enter_context(part.active(policy))
            yield

    def refresh(self, policy: Referenced) -> None:
        """Refresh every part."""
        for part in self.parts:
            part.refresh(policy)

    def check(self, *, after_warmup: bool) -> None:
        """Ask the first part."""
        self.parts[0].check(after_warmup=after_warmup)

    def bytes(self, policy: Referenced) -> int:
        """The sum over the parts."""
        return sum(part.bytes(policy) for part in self.parts)


@contextmanager
def switched(layers: Sequence[LoraLayer], attribute: str, value: object) -> Iterator[None]:
    """Inside it adapters in these layers answer as an attribute of PEFT says: `_disable_adapters`, or `_active_adapter` [name]."""
    # peft's enable_adapters and set_adapter would also flip requires_grad, which DDP, FSDP and the optimizer have already read.
    before = [getattr(layer, attribute) for layer in layers]
    try:
        for layer in layers:
            setattr(layer, attribute, value)
        yield
    finally:
        for layer, old in zip(layers, before):
            setattr(layer, attribute, old)


def reference_of(*, adapter: bool, copied: bool) -> Reference:
    """The reference of a policy that trains LoRA (adapter) or all weights, with a frozen copy of what is trained or without one."""
    if adapter:
        return FrozenAdapter() if copied else AdapterOff()
    return FrozenNetwork() if copied else NoReference()
