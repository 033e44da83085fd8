"""A copy of a policy's trainable weights that can take their place for a while: a moving average, an old policy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor

from lit_rl.errors import ConfigError
from lit_rl.policies.base import Policy
from lit_rl.policies.weights.decay import ema_update
from lit_rl.policies.weights.shards import gather_parts, part, part_of, reshard, sendable
from lit_rl.ranks import receive_from_first


class OldPolicy(Protocol):
    """The callback that keeps an older policy, as a method that samples with it sees it."""

    @property
    def is_current(self) -> bool:
        """True where the old policy is known to be the very weights that are trained: its forward would give theirs again."""

    def acting(self) -> AbstractContextManager[None]:
        """Inside it the old policy answers. Not between a forward and its backward."""


class WeightCopy:
    """The trainable weights (LoRA: the adapter) as they are now, in float32 or better, in the parts that the strategy holds.

    4 bytes per trainable weight, divided by the number of processes when sharded. While the copy is swapped in, the live weights are kept
    aside in their own precision, so that swapping back is exact. Swap only where no backward pass is still to come through an earlier
    forward. Under DeepSpeed ZeRO-3 small weights must not stay gathered (`stage3_param_persistence_threshold: 0`).
    """

    def __init__(self, policy: Policy) -> None:
        reshard(policy)
        self.parts = {name: _precise(part(p)).clone() for name, p in policy.trainable()}
        self._stash: dict[str, Tensor] | None = None

    @classmethod
    def restored(cls, policy: Policy, saved: dict[str, Tensor], *, what: str) -> WeightCopy:
        """From whole tensors, cut into this process's parts. Collective; under ZeRO-3 only the first process needs to have them.

        what: its name in the error when it is of other weights than the policy's.
        """
        names = {name for name, _ in policy.trainable()}
        if saved and names != saved.keys():
            odd = sorted(names ^ saved.keys())
            raise ConfigError(
                f"The checkpoint's {what} is of other weights than the model's ({len(odd)} differ, e.g. {odd[0]}): same LoRA settings?"
            )
        copy = cls(policy)
        for name, parameter in policy.trainable():
            tensor = saved[name] if saved else torch.empty(parameter.ds_shape)  # type: ignore[attr-defined]
            if hasattr(parameter, "ds_shape"):
                tensor = sendable(tensor)
                receive_from_first(tensor)
            copy.parts[name] = part_of(tensor, parameter)
        return copy

    @torch.no_grad()
    def follow(self, policy: Policy, *, decay: float) -> None:
        """copy <- decay copy + (1 - decay) weights; exactly the weights at 0."""
        reshard(policy)
        for name, parameter in policy.trainable():
            self.parts[name] = ema_update(self.parts[name], _precise(part(parameter)), decay=decay)

    def whole(self, policy: Policy, *, keep: bool) -> dict[str, Tensor]:
        """Whole tensors by name in `policy.named_parameters()`, on the CPU; empty where `keep` is False. Collective."""
        reshard(policy)
        wholes = ((name, gather_parts(self.parts[name], parameter)) for name, parameter in policy.trainable())
        return {name: tensor for name, tensor in wholes if keep}

    @torch.no_grad()
    def swap_in(self, policy: Policy) -> None:
        """The copy takes the place of the weights, until `swap_out`. Nothing if it has already."""
        if self._stash is not None:
            return
        reshard(policy)
        self._stash = {name: part(p).clone() for name, p in policy.trainable()}
        for name, parameter in policy.trainable():
            part(parameter).copy_(self.parts[name])
        torch.clear_autocast_cache()  # else the next forward would find the other weights there, in lower precision

    @torch.no_grad()
    def swap_out(self, policy: Policy) -> None:
        """The live weights are back, bit for bit."""
        stash, self._stash = self._stash, None
        if stash is None:
            return
        reshard(policy)
        for name, parameter in policy.trainable():
            part(parameter).copy_(stash[name])
        torch.clear_autocast_cache()

    @contextmanager
    def applied(self, policy: Policy) -> Iterator[None]:
        """Inside it the copy answers in place of the weights."""
        self.swap_in(policy)
        try:
            yield
        finally:
            self.swap_out(policy)

    @contextmanager
    def aside(self, policy: Policy) -> Iterator[None]:
        """Inside it the live weights answer, also where the copy is swapped in. Collective."""
        swapped = self._stash is not None
        self.swap_out(policy)
        try:
            yield
        finally:
            if swapped:
                self.swap_in(policy)


def _precise(weight: Tensor) -> Tensor:
    """In float32, or as it is where that is more."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32))
