"""The contract between a method and a model family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor, nn

from lit_rl.types import Cond, Info


class FlowPolicy(nn.Module, ABC):
    """A flow-matching image model as reinforcement learning sees it.

    The constructor only checks its arguments (a missing folder is an error there, before any model is read); `load` reads the weights.
    Only the trained network is a registered submodule, so that strategies wrap, shard and save just that; text encoders and the
    VAE are held out of `nn.Module`'s sight and moved by the policy itself.
    """

    network: nn.Module
    """The trained network (after `load`): LoRA-wrapped or not."""

    @abstractmethod
    def load(self) -> None:
        """Build everything from the configured folder. Idempotent."""

    def networks(self) -> Sequence[nn.Module]:
        """`network`, and its frozen copy where a full fine-tune keeps one as reference: what FSDP2 shards, each on its own."""
        return [self.network]

    @abstractmethod
    def blocks(self, network: nn.Module) -> Sequence[nn.Module]:
        """The repeated blocks of one of `networks()`, in order: what FSDP2 shards and `torch.compile` compiles one by one."""

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Cond:
        """U unique prompts -> their conditioning on `self.device`, guidance's negative prompt included as one-row entries."""

    def condition(self, info: Sequence[Info]) -> Cond:
        """What `velocity` needs to know of U prompts, one row each; by default their text alone, as `encode` has it."""
        return self.encode([str(row["prompt"]) for row in info])

    def condition_key(self, info: Info) -> Hashable:
        """What `condition` depends on: of prompts with equal keys one is conditioned for all."""
        return str(info["prompt"])

    @abstractmethod
    def velocity(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Predicted dx/dt Float32 "B *D", guidance included. x: Float32 "B *D", t: Float "B" in [0, 1] (1 = noise), cond: B rows."""

    @abstractmethod
    def decode(self, x: Tensor) -> Tensor:
        """Clean latents Float "B *D" -> images uint8 "B 3 H W"."""

    @abstractmethod
    def encode_images(self, images: Tensor, info: Sequence[Info] = ()) -> Tensor:
        """Images uint8 "B 3 H W" and the prompts they answer -> clean latents Float "B *D" (the mode of the VAE's posterior)."""

    @abstractmethod
    def latent_shape(self) -> tuple[int, ...]:
        """*D at the configured resolution."""

    @abstractmethod
    def sigmas(self, num_steps: int) -> Tensor:
        """The diffusers pipeline's own schedule, Float64 "N+1", from 1 to 0."""

    @abstractmethod
    def reference(self) -> AbstractContextManager[None]:
        """Inside it the initial weights answer: LoRA disabled, or the frozen copy of a full fine-tune."""

    def check_reference(self, *, after_warmup: bool) -> None:
        """Raise ConfigError if `reference()` would have no weights to answer with, or, after a warm-up, those from before it."""

    def refresh_reference(self) -> None:
        """Called once after a supervised warm-up: a frozen copy becomes equal to the current weights."""

    @abstractmethod
    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write what stock diffusers loads: a LoRA folder (`pipe.load_lora_weights`), or the whole pipeline (`from_pretrained`).

        weights: full, unsharded trainable tensors by their name in `self.named_parameters()`.
        """

    def checkpoint_keys(self) -> set[str]:
        """Names in `state_dict()` of what a checkpoint must hold: all but the frozen weights that `load` reads again."""
        return set(self.state_dict())

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters that training changes."""
        return ((n, p) for n, p in self.named_parameters() if p.requires_grad)
