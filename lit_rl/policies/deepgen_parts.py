"""Parts of DeepGen beside its transformer: the language model's adapter, and references of what is trained there."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from lit_rl.checkpoints.deepgen import DeepGenWeights
from lit_rl.errors import ConfigError, listed
from lit_rl.policies.conditioner import Bridge, BridgeSizes, Conditioner, blocks_of, embedding_of, frozen_copy, load_bridge
from lit_rl.policies.deepgen_files import read_language
from lit_rl.policies.weights.adapters import TRAINED, adapter_parameters, to_float32
from lit_rl.policies.weights.lora import LoraSettings, inject, linear_names
from lit_rl.policies.weights.reference import FrozenAdapter, Reference, Referenced
from lit_rl.policies.weights.shards import local, reshard

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EMBEDDING = "embed_tokens"


class HasConditioner(Protocol):
    """A policy with a conditioner."""

    conditioner: Conditioner


@dataclass
class Part:
    """The language model as `Reference` sees a network."""

    network: nn.Module
    reference_network: nn.Module | None = None
    called: str = "network"


def build_conditioner(
    weights: DeepGenWeights,
    language: str,
    *,
    train: Collection[str],
    adapter: LoraSettings,
    heads: int,
    dtype: torch.dtype,
    what: str,
) -> Conditioner:
    """The conditioner of a checkpoint. train: Parts that learn, of bridge and adapter. what: How an error begins."""
    bridge = Bridge(BridgeSizes.of(weights.bridge, what=what), heads=heads)
    load_bridge(bridge, weights.bridge, what=what)
    trained = "bridge" in train
    bridge.requires_grad_(trained).to(torch.float32 if trained else dtype)
    conditioner = Conditioner(read_language(language, dtype=dtype), bridge)
    load_language(conditioner.language, weights.language, adapter, trained="adapter" in train, what=what)
    return conditioner.eval()


# ---------------------------------------------------------------------- the language model's adapter
def load_language(language: PreTrainedModel, weights: Mapping[str, Tensor], lora: LoraSettings, *, trained: bool, what: str) -> None:
    """Lay a checkpoint's base weights and adapter over a text decoder.

    The embedding's adapter becomes part of the embedding. Where the checkpoint has no adapter, `trained` draws a new one on every linear
    layer. Raises ConfigError where names or ranks do not fit.
    """
    adapters = {name: tensor for name, tensor in weights.items() if ".lora_" in name}
    base = {name.replace(".base_layer", ""): tensor for name, tensor in weights.items() if ".lora_" not in name}
    known = {name for name, _ in language.named_parameters()}
    beyond = [name for name in base if name not in known and not _left_out(name, language)]
    if beyond:
        raise ConfigError(f"{what}: {len(beyond)} weights have no place in the language model: {listed(beyond)}")
    language.load_state_dict({name: tensor for name, tensor in base.items() if name in known}, strict=False)
    _merge_embedding(language, adapters, scale=_scale(lora))
    placed = {name: tensor for name, tensor in adapters.items() if not name.startswith(EMBEDDING) and not _left_out(name, language)}
    if placed or trained:
        targets = sorted({name.split(".lora_")[0] for name in placed}) or linear_names(language)
        inject(language, lora.new_config(target_modules=targets), seed=torch.initial_seed())
        _fill_adapter(language, placed, what=what)
    language.requires_grad_(False)
    if trained:
        for parameter in adapter_parameters(language, TRAINED).values():
            parameter.requires_grad_(True)


def _fill_adapter(language: PreTrainedModel, weights: Mapping[str, Tensor], *, what: str) -> None:
    own = dict(language.named_parameters())
    if odd := [name for name in weights if name not in own]:
        raise ConfigError(f"{what}: {len(odd)} adapters have no layer in the language model: {listed(odd)}")
    if other := [name for name, tensor in weights.items() if tensor.shape != own[name].shape]:
        there, here = list(weights[other[0]].shape), list(own[other[0]].shape)
        raise ConfigError(
            f"adapter: {other[0]} is {there} in the checkpoint and {here} here: set model.policy.adapter.rank to {min(there)}"
        )
    with torch.no_grad():
        for name, tensor in weights.items():
            own[name].copy_(tensor)
    to_float32(language, TRAINED)


def _scale(lora: LoraSettings) -> float:
    assert lora.rank is not None and lora.alpha is not None, "both have defaults where no adapter is given by a folder"
    return lora.alpha / lora.rank


def _merge_embedding(language: PreTrainedModel, adapters: Mapping[str, Tensor], *, scale: float) -> None:
    """E + scale (B A)^T: PEFT keeps an embedding's matrices in no module that a strategy could gather."""
    down, up = (adapters.get(f"{EMBEDDING}.lora_embedding_{side}.{TRAINED}") for side in "AB")
    if down is not None and up is not None:
        weight = embedding_of(language).weight
        with torch.no_grad():
            weight += (scale * (up.float() @ down.float()).T).to(weight.dtype)


def _left_out(name: str, language: nn.Module) -> bool:
    """A weight of the last layer or the norm behind it, which no condition depends on."""
    return name.startswith("norm.") or name.startswith(f"layers.{len(blocks_of(language))}.")


# ---------------------------------------------------------------------- references
class FrozenBridge(Reference):
    """A frozen copy of the bridge inside of the conditioner, which answers while it is active."""

    def __init__(self, owner: HasConditioner) -> None:
        self.owner = owner

    def add(self, policy: Referenced, *, dtype: torch.dtype) -> None:
        """Copy the bridge."""
        conditioner = self.owner.conditioner
        conditioner.frozen = frozen_copy(conditioner.bridge, dtype)

    @contextmanager
    def active(self, policy: Referenced) -> Iterator[None]:
        """Inside it the copy's queries are asked and the copy answers."""
        conditioner = self.owner.conditioner
        before, conditioner.frozen_is_active = conditioner.frozen_is_active, True
        try:
            yield
        finally:
            conditioner.frozen_is_active = before

    @torch.no_grad()
    def refresh(self, policy: Referenced) -> None:
        """The copy <- the bridge; local shards when sharded."""
        reshard(self.owner.conditioner)
        for mine, theirs in zip(self._frozen().parameters(), self.owner.conditioner.bridge.parameters(), strict=True):
            local(mine).copy_(local(theirs))

    def bytes(self, policy: Referenced) -> int:
        """The bridge again."""
        return sum(p.nbytes for p in self._frozen().parameters())

    def _frozen(self) -> Bridge:
        assert self.owner.conditioner.frozen is not None, "the copy is made when the policy is loaded"
        return self.owner.conditioner.frozen


class FrozenLanguageAdapter(Reference):
    """A frozen copy of the language model's adapter beside it."""

    def __init__(self, owner: HasConditioner) -> None:
        self.owner, self.copy = owner, FrozenAdapter()

    def add(self, policy: Referenced, *, dtype: torch.dtype) -> None:
        """Copy the adapter."""
        self.copy.add(self._part(), dtype=dtype)

    def active(self, policy: Referenced) -> AbstractContextManager[None]:
        """Inside it the copy answers."""
        return self.copy.active(self._part())

    def refresh(self, policy: Referenced) -> None:
        """The copy <- the adapter."""
        reshard(self.owner.conditioner)
        self.copy.refresh(self._part())

    def bytes(self, policy: Referenced) -> int:
        """The adapter again, in float32."""
        return self.copy.bytes(self._part())

    def _part(self) -> Part:
        return Part(self.owner.conditioner.language)
