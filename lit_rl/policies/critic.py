"""Value models: the reward that a text which is not finished will bring."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from lit_rl.checkpoints.layout import Geometry
from lit_rl.errors import ConfigError
from lit_rl.policies.base import TokenPolicy
from lit_rl.policies.causal_lm import Dtype
from lit_rl.policies.language_model import check_folder, freeze_tower, read_lm, recompute, seen_by
from lit_rl.policies.lm_head import body
from lit_rl.policies.sizes import check_length, check_same_tokens, read_config
from lit_rl.policies.tokenizer import read_tokenizer
from lit_rl.policies.weights.adapters import geometry
from lit_rl.policies.weights.language_lora import add_language_lora, merged
from lit_rl.policies.weights.lora import LoraSettings
from lit_rl.policies.weights.lora_sites import repeated_blocks
from lit_rl.types import Media, Pictures

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ValueHead(nn.Linear):
    """One number in float32 whatever the precision around it: returns are told apart more finely than bfloat16 can."""

    def __init__(self, hidden: int) -> None:
        super().__init__(hidden, 1)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Values Float32 "N" of hidden states "N H"."""
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(hidden.float(), self.weight.float(), self.bias.float())[:, 0]


class ValueNetwork(nn.Module):
    """A language model with one number in place of its output layer, 0 before it is trained."""

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        hidden = lm.get_output_embeddings().in_features
        lm.set_output_embeddings(nn.Identity())
        self.lm = lm
        self.head = ValueHead(hidden)

    def forward(self, tokens: Tensor, places: Tensor, *, positions: Tensor | None = None, pictures: Pictures | None = None) -> Tensor:
        """Values Float32 "N" at `places`, flat indices into `tokens`, Int "B T", padded on the right. positions: see `TokenNetwork`."""
        found = body(self.lm)(input_ids=tokens, position_ids=positions, use_cache=False, **seen_by(self.lm, pictures))
        return self.head(found.last_hidden_state.flatten(0, 1)[places])


class Critic(nn.Module):
    """A language model that predicts what reward is still to come, with weights of its own.

    Args:
        pretrained: Folder in transformers format, or hub id, of a causal language model (a reward model, of which the body is taken);
            default: that of the policy, whose initial weights it then starts from.
        lora: Train low-rank adapters and the value head; None trains everything, in float32. `lora.initial` may be a policy's adapter.
        gradient_checkpointing: Recompute each block in the backward pass.
        dtype: Of the frozen weights, with LoRA those of the base.
        attention: Implementation, as transformers names it; None = its own choice.
        revision: Of a hub repository.
        trust_remote_code: Run Python code that comes with the model.
    """

    network: ValueNetwork

    def __init__(
        self,
        pretrained: str | None = None,
        *,
        lora: LoraSettings | None = None,
        gradient_checkpointing: bool = False,
        dtype: Dtype = "float32",
        attention: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self.pretrained = None if pretrained is None else check_folder(pretrained)
        if lora is not None and "lm_head" in (lora.named or []):
            raise ConfigError("critic.lora.targets: a critic has a value head in place of lm_head: leave lm_head out of its list")
        self.lora = lora
        self.adapter: Geometry | None = None  # layers and strengths of the trained adapter, for checkpoints
        self.gradient_checkpointing = gradient_checkpointing
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.attention = attention
        self.source = {"revision": revision, "trust_remote_code": trust_remote_code}

    def check_sizes(self, beside: Any, longest: int) -> None:
        """Raise ConfigError where a critic of another folder than the policy's has another vocabulary, or too few positions. No weights."""
        if self.pretrained is None or (config := read_config(self.pretrained, **self.source)) is None:
            return
        size, needed = config.get_text_config().vocab_size, max(beside.tokenizer.get_vocab().values()) + 1
        own = {"tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model"}
        if not Path(self.pretrained).is_dir() or any((Path(self.pretrained) / name).is_file() for name in own):
            tokenizer = read_tokenizer(self.pretrained, **self.source)
            check_same_tokens(beside.tokenizer, tokenizer, key="critic.pretrained", pretrained=self.pretrained)
        if size < needed:
            raise ConfigError(
                f"critic.pretrained: {self.pretrained!r} has an embedding (vocab_size) of {size} tokens, and the policy's tokenizer has "
                f"{needed}: take a model with the policy's tokenizer"
            )
        remedy = "allow shorter sequences, or take a critic of longer ones"
        check_length(config, longest, pretrained=self.pretrained, what="critic: sequences have up to", remedy=remedy)

    def load(self, beside: Any) -> None:
        """Read the weights (on the CPU). beside: the policy, whose folder it is where none is given. Idempotent."""
        if "network" in self._modules:
            return
        folder, source = (self.pretrained, self.source) if self.pretrained else (beside.pretrained, beside.source)
        lm = read_lm(folder, dtype=self.dtype if self.lora else torch.float32, attention=self.attention, **source)
        if not self.pretrained and (first := getattr(beside.lora, "initial", None)) and getattr(self.lora, "initial", None) is None:
            lm = merged(lm, Path(first).expanduser()).requires_grad_(False)  # the policy's initial weights, its adapter included
        if self.lora:
            add_language_lora(lm, self.lora, seed=torch.initial_seed())
            self.adapter = geometry(lm)
        else:
            lm.requires_grad_(True)
            freeze_tower(lm)
        self.network = ValueNetwork(lm)
        if self.gradient_checkpointing:
            recompute(self.blocks(self.network))

    def train(self, mode: bool = True) -> Self:
        """Always in evaluation mode: with dropout, new values would differ from those of a moment ago by more than learning moves them."""
        return super().train(False)

    def networks(self) -> Sequence[nn.Module]:
        """The one trained network."""
        return [self.network]

    def blocks(self, network: nn.Module) -> Sequence[nn.Module]:
        """The decoder layers."""
        return repeated_blocks(network.get_submodule("lm"))

    def checkpoint_keys(self) -> set[str]:
        """Everything; with LoRA the adapters and the head, without the base."""
        keys = set(self.state_dict())
        return {key for key in keys if ".lora_" in key or ".head." in key} if self.lora else keys

    def values(self, tokens: Tensor, lengths: Tensor, mask: Tensor, *, media: Media = (), beside: TokenPolicy | None = None) -> Tensor:
        """Values Float32 "B S" of the text before each chosen token; 0 where `mask` is False. Arguments as of `TokenPolicy.logprobs`.

        beside: The policy, which knows how pictures are read.
        """
        width = max(int(lengths.max()), 2)
        inputs, chosen = tokens[:, : width - 1], mask[:, : width - 1]
        inputs = inputs.where(torch.arange(width - 1, device=tokens.device) < lengths[:, None], 0)  # padding may be no token at all
        places = chosen.flatten().nonzero()[:, 0]
        inputs, positions, pictures = (inputs, None, None) if beside is None else beside.look(inputs, chosen, media)
        found = self.network(inputs, places, positions=positions, pictures=pictures)
        flat = found.new_zeros(chosen.numel()).index_put((places,), found)
        return nn.functional.pad(flat.view(chosen.shape), (0, mask.shape[1] - chosen.shape[1]))
