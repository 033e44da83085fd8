"""Causal language models of transformers: Qwen, Llama, DeepSeek, ..."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from lit_rl.errors import ConfigError
from lit_rl.policies.base import Message, TokenPolicy
from lit_rl.policies.chat import PLAIN_TEMPLATE, many_prompt_ids, prompt_ids
from lit_rl.policies.chat_template import check_template, stored_stop_ids, turn_ends
from lit_rl.policies.language_model import TokenNetwork, check_folder, read_lm, recompute, save_lm
from lit_rl.policies.lm_head import recognized
from lit_rl.policies.reply import reply
from lit_rl.policies.sizes import check_length, check_vocabulary, read_config
from lit_rl.policies.tokenizer import Tokenizer, read_tokenizer
from lit_rl.policies.trained import TrainedPolicy
from lit_rl.policies.unread import leaves_weights
from lit_rl.policies.weights.language_lora import add_language_lora, read_adapter_config, save_adapter, split_adapter
from lit_rl.policies.weights.lora import LoraSettings, base_name
from lit_rl.policies.weights.lora_sites import repeated_blocks
from lit_rl.types import Answer, Info, Media, Pictures

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

Dtype = Literal["float32", "bfloat16", "float16"]


class CausalLM(TrainedPolicy, TokenPolicy):
    """A language model with its tokenizer from one folder or hub id.

    Args:
        pretrained: Folder in transformers format, or hub id (owner/name). Or the folder of an adapter in PEFT's format, such as an export
            of an earlier stage: its base is read, and `lora.initial` is that folder.
        lora, keep_reference: See `TrainedPolicy`. LoRA sits on every linear layer of the blocks unless it names its targets.
        gradient_checkpointing: Recompute each block in the backward pass.
        compile: `torch.compile` each block; pays on a GPU only, and less than for images, as lengths differ between micro-batches.
        dtype: Of the frozen weights: with LoRA those of the base, else those of a kept reference. What is trained is float32.
        padding_free: Put the sequences of a micro-batch side by side in one row, without padding. Pays with "flash_attention_2"; on a CPU
            padding costs less than the block-diagonal mask. Models that do not keep sequences apart there (with states, convolutions,
            positions of their own) are refused when training starts.
        attention: Implementation, as transformers names it ("sdpa", "flash_attention_2", "eager"); None = its own choice, and with
            `padding_free` flash_attention_2 on an NVIDIA GPU that has it, see `lit_rl.policies.by_device.Place`.
        chat_template: Jinja text, or a file that holds it, instead of the tokenizer's own.
        chat_template_kwargs: For the template, e.g. {enable_thinking: false}.
        revision: Of a hub repository.
        trust_remote_code: Run Python code that comes with the model.
    """

    stored_with: Sequence[str] = ("dtype",)
    network: TokenNetwork

    def __init__(
        self,
        pretrained: str,
        *,
        lora: LoraSettings | None = None,
        keep_reference: bool = False,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        dtype: Dtype = "float32",
        padding_free: bool = False,
        attention: str | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: dict[str, object] | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        base, lora, adapter = split_adapter(pretrained, lora)
        if lora is not None and lora.initial is not None:
            read_adapter_config(Path(lora.initial).expanduser())
        super().__init__(lora=lora, keep_reference=keep_reference)
        self.pretrained = check_folder(base)
        self.tokenizer_folder = str(adapter) if adapter and (adapter / "tokenizer_config.json").is_file() else self.pretrained
        self.endings = [self.pretrained] if adapter is None else [str(adapter), self.pretrained]  # whose files name the ends of text
        self.gradient_checkpointing = gradient_checkpointing
        self.compile_blocks = compile
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.padding_free = padding_free
        self.attention = attention
        self.chat_template = chat_template
        self.chat_template_kwargs = chat_template_kwargs or {}
        self.source = {"revision": revision, "trust_remote_code": trust_remote_code}

    # ------------------------------------------------------------------ loading
    def load(self) -> None:
        """Read the weights (on the CPU). Call it outside of any context that re-places new modules, such as `deepspeed.zero.Init`."""
        if "network" in self._modules:
            return
        lm = self._read()
        head = recognized(lm)
        if not leaves_weights() and (stops := self.stop_ids):  # what this run learns as ends, the export says too
            lm.config.eos_token_id = lm.generation_config.eos_token_id = stops if len(stops) > 1 else stops[0]
        self.set_network(lm, add=lambda lora: self.add_adapter(lm, lora), dtype=self.dtype)
        self.network = TokenNetwork(lm, head)
        if self.reference_network is not None:
            assert isinstance(self.reference_network, type(lm)), "a copy of the network"
            self.reference_network = TokenNetwork(self.reference_network, head)
        for network in self.networks():
            if self.gradient_checkpointing:
                recompute(self.blocks(network))
        if self.compile_blocks:
            self.compile_each(dynamic=True)

    def _read(self) -> PreTrainedModel:
        return read_lm(self.pretrained, dtype=torch.float32 if self.full else self.dtype, attention=self.attention, **self.source)

    def add_adapter(self, lm: PreTrainedModel, lora: LoraSettings) -> None:
        add_language_lora(lm, lora, seed=torch.initial_seed())

    def blocks(self, network: nn.Module) -> Sequence[nn.Module]:
        """The decoder layers."""
        return repeated_blocks(network.get_submodule("lm"))

    # ------------------------------------------------------------------ text
    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the folder, with the configured chat template or a plain one. Read when first asked for."""
        tokenizer = read_tokenizer(self.tokenizer_folder, **self.source)
        if self.chat_template is not None:
            file = Path(self.chat_template).expanduser()
            tokenizer.chat_template = (
                file.read_text(encoding="utf-8-sig") if "{" not in self.chat_template and file.is_file() else self.chat_template
            )
        elif tokenizer.chat_template is None:
            log.info("%s has no chat template: conversations are written out as `user: ...`, `assistant: ...`", self.pretrained)
            tokenizer.chat_template = PLAIN_TEMPLATE
        check_template(tokenizer)
        return tokenizer

    @cached_property
    def stop_ids(self) -> list[int]:  # type: ignore[override]
        """The tokenizer's end of text, what the model's generation_config and config name, and what ends a turn of the chat template."""
        tokens = turn_ends(self.tokenizer, **self.chat_template_kwargs).stops
        stored = [stop for place in self.endings for stop in stored_stop_ids(place, str(self.source["revision"] or "main"))]
        ids = [self.tokenizer.eos_token_id, *stored]
        found = list(dict.fromkeys(i for i in [*ids, *self.tokenizer.convert_tokens_to_ids(list(tokens))] if i is not None))
        if not found:
            raise ConfigError(
                f"pretrained: {self.pretrained!r} names no end-of-text token, neither its tokenizer nor generation_config.json, "
                "config.json or the chat template"
            )
        return found

    def encode(self, prompt: str | Sequence[Message], **template: object) -> list[int]:
        """Token ids of a prompt through the chat template; `template` goes before `chat_template_kwargs`."""
        return prompt_ids(self.tokenizer, prompt, **{**self.chat_template_kwargs, **template})

    def encode_many(self, prompts: Sequence[str | Sequence[Message]], templates: Sequence[Mapping[str, object]]) -> list[list[int]]:
        """`encode` of each prompt with its arguments of the template."""
        if getattr(self.encode, "__func__", None) is not CausalLM.encode:  # a policy of somebody's own
            return [self.encode(prompt, **template) for prompt, template in zip(prompts, templates, strict=True)]
        return many_prompt_ids(self.tokenizer, prompts, [{**self.chat_template_kwargs, **template} for template in templates])

    def decode(self, ids: Sequence[int]) -> str:
        """The text without special tokens and without the token that ends the turn."""
        ended = bool(ids) and ids[-1] in self.stop_ids  # not all tokens that end a turn are special ones
        text = self.tokenizer.decode(list(ids[:-1] if ended else ids), skip_special_tokens=True)
        return text.removesuffix(turn_ends(self.tokenizer, **self.chat_template_kwargs).text) if ended else text

    def reply(self, ids: Sequence[int], *, prompt_ids: Sequence[int], info: Info) -> Answer:
        """The answer with the special tokens in it, and with the part of it that its prompt holds already."""
        return reply(self.tokenizer, ids, text=self.decode(ids), prompt_ids=prompt_ids, info=info, stop_ids=self.stop_ids)

    def check_sizes(self, longest: int, *, what: str, remedy: str) -> None:
        """Raise ConfigError where tokens have no row in the embedding, or `longest` tokens no positions. Reads no weights.

        what, remedy: which sequences are so long, and how they get shorter, for the message.
        """
        config = read_config(self.pretrained, **self.source)
        if config is not None:
            check_vocabulary(config, self.tokenizer, self.stop_ids, pretrained=self.pretrained)
            check_length(config, longest, pretrained=self.pretrained, what=what, remedy=remedy)

    # ------------------------------------------------------------------ the network
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
        """One forward over the micro-batch; without padding where `padding_free` is set."""
        width = max(int(lengths.max()), 2)
        inputs, chosen = tokens[:, : width - 1], mask[:, : width - 1]
        inputs = inputs.where(torch.arange(width - 1, device=tokens.device) < lengths[:, None], 0)  # padding may be no token at all
        places = chosen.flatten().nonzero()[:, 0]
        targets, at = tokens[:, 1:width].flatten()[places], places
        inputs, positions, pictures = self.look(inputs, chosen, media)
        if self.padding_free:
            column = torch.arange(width - 1, device=tokens.device).expand_as(inputs)
            real = column < (lengths - 1)[:, None]
            at = (real.flatten().cumsum(0) - 1)[places]
            inputs, packed = inputs[real][None], column[real][None]
            positions = packed if positions is None else torch.cat([packed[None], positions[:, real][:, None]])
        network = getattr(self, self.called)
        weights = None if arriving is None else arriving[:, : width - 1].flatten()[places]
        if isinstance(temperature, Tensor):
            temperature = temperature[places // (width - 1)]
        seen = {"positions": positions, "pictures": pictures}
        new, entropies = network(inputs, at, targets, temperature=temperature, entropy=entropy, arriving=weights, **seen)

        def spread(values: Tensor) -> Tensor:
            flat = values.new_zeros(chosen.numel()).index_put((places,), values)
            return nn.functional.pad(flat.view(chosen.shape), (0, mask.shape[1] - chosen.shape[1]))

        return spread(new), None if entropies is None else spread(entropies)

    def look(self, inputs: Tensor, chosen: Tensor, media: Media) -> tuple[Tensor, Tensor | None, Pictures | None]:
        """See `TokenPolicy.look`: the model sees no media, which a method may have noted for itself."""
        return inputs, None, None

    def plain_logprobs(self, ids: Tensor, media: Sequence[Tensor] = ()) -> Tensor:
        """Float32 "T-1" of one sequence Int "T", from the logits of the model's plain forward."""
        places = torch.arange(len(ids) - 1, device=ids.device)
        pictures = self.look(ids[None], torch.zeros_like(ids[None], dtype=torch.bool), [media])[2]
        network, told = self.active_network, {"temperature": 1.0, "entropy": False, "plain": True}
        return network(ids[None], places, ids[1:], positions=None, pictures=pictures, **told)[0]

    # ------------------------------------------------------------------ saving
    def float32_weights(self) -> Collection[str]:
        """The weights that transformers reads in float32 whatever dtype is asked for."""
        lm = self.network.lm
        parts = [*(lm._keep_in_fp32_modules or ()), *(lm._keep_in_fp32_modules_strict or ())]
        return {name for name, _ in self.trainable() if any(part in name for part in parts)}

    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """A PEFT adapter (`PeftModel.from_pretrained(base, folder)`), or a whole model with its tokenizer (`from_pretrained(folder)`)."""
        lm = self.network.lm
        named = {name.removeprefix("network.lm."): tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
        if self.lora:
            save_adapter(lm, folder, named, base=base_name(self.pretrained))
            lm.generation_config.save_pretrained(folder)  # what ends an answer now
            return
        buffers = dict(lm.named_buffers())
        named |= {key: value.detach().cpu() for key, value in lm.state_dict().items() if key in buffers}
        save_lm(lm, folder, named)
        self.tokenizer.save_pretrained(folder)
