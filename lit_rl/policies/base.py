"""The contracts between a method and a model family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor, nn

from lit_rl.errors import ConfigError
from lit_rl.losses.masked import finite_rows
from lit_rl.types import Answer, Cond, Info, Media, Pictures, Size


class Policy(nn.Module, ABC):
    """A model as training, callbacks and strategies see it.

    The constructor only checks its arguments (a missing folder is an error there, before any model is read); `load` reads the weights.
    Only the trained network is a registered submodule, so that strategies wrap, shard and save just that; frozen parts are held out of
    `nn.Module`'s sight and moved by the policy itself.
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
    def reference(self) -> AbstractContextManager[None]:
        """Inside it the initial weights answer: LoRA disabled, or the frozen copy of a full fine-tune."""

    @property
    def has_reference(self) -> bool:
        """`reference()` has weights to answer with."""
        return False

    def check_reference(self, *, after_warmup: bool) -> None:
        """Raise ConfigError if `reference()` would have no weights to answer with, or, after a warm-up, those from before it."""

    def refresh_reference(self) -> None:
        """Called once after a supervised warm-up: a frozen copy becomes equal to the current weights."""

    @abstractmethod
    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write what the stock library loads: a LoRA folder, or the whole model (`from_pretrained`).

        weights: full, unsharded trainable tensors by their name in `self.named_parameters()`.
        """

    def check_format(self, format: str) -> None:
        """Raise ConfigError if `save` does not take this `format` beside its own: those of a style adapter are the only ones."""
        raise ConfigError(
            f"Export format={format} is one of a style adapter's file, and {type(self).__name__} trains none here: leave it out"
        )

    def checkpoint_keys(self) -> set[str]:
        """Names in `state_dict()` of what a checkpoint must hold: all but the frozen weights that `load` reads again."""
        return set(self.state_dict())

    def learning_rates(self) -> Mapping[str, float]:
        """Learning rates other than the optimizer's own, by the beginning of the names of the parameters that have them."""
        return {}

    @property
    def device(self) -> torch.device:
        """The device of the first parameter."""
        return next(self.parameters()).device

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters that training changes."""
        return ((n, p) for n, p in self.named_parameters() if p.requires_grad)


class FlowPolicy(Policy):
    """A flow-matching image model."""

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Cond:
        """U unique prompts -> their conditioning on `self.device`, guidance's negative prompt included as one-row entries."""

    guidance_scale: float = 1.0
    """Weight of guidance; without meaning in families that have none."""

    trains_condition = False
    """`condition` depends on trained weights. Then a loss computes it again, with gradient, where it else takes that of the rollout."""

    any_size = False
    """`encode_images` and `velocity` take pictures of any size that its cells fill, beside those of the configured resolution."""

    def condition(self, info: Sequence[Info]) -> Cond:
        """Conditioning of U prompts for `velocity`, one row each; by default of their text alone, by `encode`."""
        return self.encode([str(row["prompt"]) for row in info])

    def condition_key(self, info: Info) -> Hashable:
        """Prompts with equal keys are conditioned once for all of them."""
        return str(info["prompt"])

    @abstractmethod
    def velocity(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Predicted dx/dt Float32 "B *D", guidance included. x: Float32 "B *D", t: Float "B" in [0, 1] (1 = noise), cond: B rows."""

    @abstractmethod
    def decode(self, x: Tensor) -> Tensor:
        """Clean latents Float "B *D" -> images uint8 "B 3 H W"."""

    finite_pixels: Tensor | None = None
    """Bool "B" of the last `decode`, where it knows: images that had no NaN or infinity before they became uint8."""

    def picture(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`decode`, and Bool "B" on the CPU: samples whose latents and pixels are all finite. The others look black, or like anything."""
        self.finite_pixels = None
        images, finite = self.decode(x).cpu(), finite_rows(x).cpu()
        return images, finite if self.finite_pixels is None else finite & self.finite_pixels.cpu()

    @abstractmethod
    def encode_images(self, images: Tensor, info: Sequence[Info] = ()) -> Tensor:
        """Images uint8 "B 3 H W" and the prompts they answer -> clean latents Float "B *D" (the mode of the VAE's posterior)."""

    @abstractmethod
    def latent_shape(self) -> tuple[int, ...]:
        """*D at the configured resolution."""

    @abstractmethod
    def sigmas(self, num_steps: int) -> Tensor:
        """The diffusers pipeline's own schedule, Float64 "N+1", from 1 to 0."""


Message = Mapping[str, object]
"""{"role": "system" | "user" | "assistant" | "tool" | ..., "content": text}, and tool_calls or reasoning_content where it has some."""


class TokenPolicy(Policy):
    """A causal language model. The log-probability of a token is read at the place before it: action s chooses token s + 1."""

    stop_ids: Sequence[int]
    """Tokens that end an answer (end of text, end of turn); the first one is what a supervised answer is ended with."""

    banned_ids: Sequence[int] = ()
    """Tokens that no answer may hold, such as those that stand for pictures. Samplers leave them out."""

    @abstractmethod
    def encode(self, prompt: str | Sequence[Message], **template: object) -> list[int]:
        """Token ids of a prompt, ready for an answer: a conversation through the chat template, a string as it is.

        template: What this prompt gives to the chat template beside its messages, e.g. tools.
        """

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens and without what ends a turn."""

    def reply(self, ids: Sequence[int], *, prompt_ids: Sequence[int], info: Info) -> Answer:
        """An answer to a prompt, as rewards see it."""
        return Answer(self.decode(ids))

    def float32_weights(self) -> Collection[str]:
        """Names of trained weights that stay float32 where the others are in fewer bits."""
        return ()

    def with_pictures(self, ids: Sequence[int], learned: Sequence[bool], sizes: Sequence[Size]) -> tuple[list[int], list[bool]]:
        """Token ids with as many places for each picture as the model reads of it, and which of them are learned.

        ids: Of a whole conversation or prompt, with one place for each picture. sizes: (height, width) of the pictures in pixels, in order.
        Raises ConfigError where places and pictures differ in number, and for a model that reads text only.
        """
        if sizes:
            raise ConfigError(
                f"there are {len(sizes)} images, and {type(self).__name__} reads text only: set model.policy to "
                "lit_rl.policies.vision_language.VisionLanguageModel, or take the images out"
            )
        return list(ids), list(learned)

    def one_place_each(self, ids: Sequence[int]) -> Sequence[int]:
        """A prompt's ids with one place for each of its pictures, as `with_pictures` takes them."""
        return ids

    def misplaced(self, ids: Sequence[int], media: Sequence[Tensor]) -> str:
        """A sentence where a prompt's tokens do not fit the media of its row; empty where they do."""
        return ""

    def media(self, pictures: Sequence[Tensor]) -> Sequence[Tensor]:
        """Pictures uint8 "3 H W" of one row as `logprobs` and engines take them: at the size at which the model reads them."""
        return pictures

    @abstractmethod
    def look(self, inputs: Tensor, chosen: Tensor, media: Media) -> tuple[Tensor, Tensor | None, Pictures | None]:
        """Inputs, their positions where the model does not place them itself, and the pictures among them.

        inputs: Int "B T"; chosen: Bool "B T", True where the policy chose the next token; media: of each row, or empty.
        """

    def generation_inputs(self, ids: Tensor, media: Media) -> dict[str, Tensor]:
        """Arguments of transformers' `generate` beside the prompts Int "B T", which are padded on the left: their pictures."""
        return {}

    def trial(self, ids: Sequence[int]) -> tuple[list[int], Sequence[Tensor]]:
        """A short sequence with everything in it that the model reads, and its media, for checks. ids: Words to begin with."""
        return list(ids), ()

    @abstractmethod
    def logprobs(
        self,
        tokens: Tensor,
        lengths: Tensor,
        mask: Tensor,
        *,
        media: Media = (),
        temperature: float | Tensor = 1.0,
        entropy: bool = False,
        arriving: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """log p(tokens[:, s + 1] | tokens[:, : s + 1]) Float32 "B S" where `mask` is True, 0 elsewhere, and the entropies if asked for.

        tokens: Int "B S+1", padded on the right with anything; lengths: Int "B", tokens of each row; mask: Bool "B S". Logits are
        divided by `temperature` (of all, or Float "B" of each row) and computed at the masked places only, a chunk of tokens at a time.
        media: Of each row, as `self.media` gives them; empty where no row has any.
        arriving: Float "B S", where the loss is linear in log p: its weights, but for one factor. A policy may save work by it.
        """
