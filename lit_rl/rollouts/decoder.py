"""The forward pass of Qwen2, Qwen3 and Llama over fused copies of their weights, with a key-value cache and no module in between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_rl.policies.weights.shards import readable
from lit_rl.rollouts.fused import Fused, Norm, fuse, interleaved

STATIC_ROPE = ("default", "linear", "llama3", "yarn")
PREFILL_TOKENS = 8192
"""Tokens of prompts, padding included, that go through the network at once."""


def unsupported(lm: Any) -> str | None:
    """Why `Decoder` cannot stand for this language model; None where it can."""
    import transformers

    config = lm.config
    classes = (transformers.Qwen2ForCausalLM, transformers.Qwen3ForCausalLM, transformers.LlamaForCausalLM)
    if type(lm) not in classes:
        return f"it knows {', '.join(known.__name__ for known in classes)}, and this is a {type(lm).__name__}"
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or []):
        return "some of its layers have a sliding attention window"
    if config.hidden_act not in ("silu", "swish"):
        return f"its activation is {config.hidden_act}, not silu"
    kind = config.rope_parameters["rope_type"]
    if kind not in STATIC_ROPE or 2 * len(lm.model.rotary_emb.inv_freq) != lm.model.layers[0].self_attn.head_dim:
        return f"its rotary positions (rope_type={kind}) depend on the length or leave out a part of a head"
    for name, module in lm.named_modules():
        if hasattr(module, "base_layer") and not _is_plain_lora(module):
            return f"{name} has an adapter other than LoRA of a linear layer"
        if "_proj" in name.rpartition(".")[2] and not isinstance(getattr(module, "base_layer", module), nn.Linear):
            return f"{name} is a {type(module).__name__}, not a linear layer"
        if isinstance(module, nn.Linear) and not module.weight.is_floating_point():
            return f"{name} is quantized"
    return None


def _is_plain_lora(module: Any) -> bool:
    adapters = getattr(module, "lora_A", None)
    plain = isinstance(module.base_layer, nn.Linear) and adapters is not None
    return plain and not module.lora_variant and not module.fan_in_fan_out and not any(module.lora_bias.values()) and not module.merged


@dataclass
class Block:
    """One decoder layer."""

    norm: Norm
    qkv: Fused
    query_norm: Norm | None
    key_norm: Norm | None
    out: Fused
    mlp_norm: Norm
    gate_up: Fused
    down: Fused


class Cache:
    """Keys and values Float "layers 2 rows heads columns D" of the tokens so far. A row's tokens start at column 0.

    Zero where nothing was written: what is masked is multiplied by 0, and 0 * NaN is NaN.
    """

    def __init__(self, decoder: Decoder, rows: int, block: int = 128) -> None:
        self.block, self.columns = block, 0
        self.data = decoder.embedding.new_zeros(
            len(decoder.blocks), 2, rows, decoder.kv_heads, 0, decoder.head_dim, dtype=decoder.compute_dtype
        )

    def reserve(self, columns: int) -> None:
        """Make room for so many tokens in each row: a quarter more than is there, at least."""
        if columns > self.columns:
            wanted = max(columns, self.columns * 5 // 4)
            self.data = F.pad(self.data, (0, 0, 0, -(-wanted // self.block) * self.block - self.columns))
            self.columns = self.data.shape[4]

    def put(self, first: int, count: int, entry: Tensor) -> None:
        """`entry` Float "layers 2 heads T D" into `count` rows."""
        length = entry.shape[3]
        self.reserve(length + 1)
        self.data[:, :, first : first + count, :, :length] = entry[:, :, None]

    def move(self, source: int, target: int, length: int) -> None:
        self.data[:, :, target, :, :length] = self.data[:, :, source, :, :length]


class Decoder:
    """A language model's present weights, ready to generate from.

    A copy of what is joined (queries, keys and values; gates and ups), sharded or computed with in another precision than it is kept in; of
    everything in float32 on a CPU. Collective where weights are sharded. Adapters count as they are switched at the moment.
    """

    def __init__(self, lm: Any) -> None:
        config, model = lm.config, lm.model
        first = model.layers[0].self_attn
        embedding, head = lm.get_input_embeddings().weight, lm.get_output_embeddings()
        self.stream_dtype: torch.dtype = embedding.dtype
        device = embedding.device.type
        self.compute_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.stream_dtype
        self.head_dim: int = first.head_dim
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.scaling: float = first.scaling
        self.embedding = readable(embedding, self.stream_dtype)
        self.norm = self._norm(model.norm)
        self.blocks = [self._block(layer) for layer in model.layers]
        self.head = fuse([head], self.compute_dtype)
        self.frequencies = model.rotary_emb.inv_freq.float()
        self.attention_scaling = float(model.rotary_emb.attention_scaling)

    def _norm(self, norm: Any, order: Tensor | slice = slice(None)) -> Norm:
        return Norm(readable(norm.weight, norm.weight.dtype)[order], norm.variance_epsilon)

    def _block(self, layer: Any) -> Block:
        attention, mlp, dtype = layer.self_attn, layer.mlp, self.compute_dtype
        norms: list[Norm | None] = [None, None]
        if hasattr(attention, "q_norm"):
            order = interleaved(self.head_dim, self.head_dim).to(self.embedding.device)
            norms = [self._norm(norm, order) for norm in (attention.q_norm, attention.k_norm)]
        return Block(
            norm=self._norm(layer.input_layernorm),
            qkv=fuse([attention.q_proj, attention.k_proj, attention.v_proj], dtype, paired=self.head_dim),
            query_norm=norms[0],
            key_norm=norms[1],
            out=fuse([attention.o_proj], dtype),
            mlp_norm=self._norm(layer.post_attention_layernorm),
            gate_up=fuse([mlp.gate_proj, mlp.up_proj], dtype),
            down=fuse([mlp.down_proj], dtype),
        )

    # ------------------------------------------------------------------ forward
    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[list[Tensor], Tensor]:
        """Keys and values "layers 2 heads T D" of each prompt, and the logits Float32 "prompts V" after its last token."""
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        entries: list[Tensor] = [self.embedding] * len(prompts)
        last: list[Tensor] = [self.embedding] * len(prompts)
        while order:
            width = len(prompts[order[0]])
            some, order = order[: max(1, PREFILL_TOKENS // width)], order[max(1, PREFILL_TOKENS // width) :]
            cache, hidden = self._prefill([prompts[i] for i in some], width)
            for row, i in enumerate(some):
                entries[i], last[i] = cache[:, :, row, :, : len(prompts[i])], hidden[row]
        return entries, self.logits(torch.stack(last))

    def _prefill(self, prompts: Sequence[Sequence[int]], width: int) -> tuple[Tensor, Tensor]:
        """Padded on the right, where causal attention never looks from a real token."""
        tokens = torch.zeros(len(prompts), width, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = torch.tensor(prompt)
        device = self.embedding.device
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        x = F.embedding(tokens.to(device), self.embedding).flatten(0, 1)
        turns = self._turns_at(torch.arange(width, device=device).repeat(len(prompts)))
        written = []
        for block in self.blocks:
            heads = self._heads(block, x, turns).unflatten(0, (-1, width)).transpose(1, 2)
            query, key, value = heads.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
            written.append(torch.stack([key, value]))
            mixed = F.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=self.scaling, enable_gqa=self.heads != self.kv_heads
            )
            x = self._rest(block, x, mixed.transpose(1, 2).reshape(len(x), -1))
        hidden = x.view(len(prompts), width, -1)[torch.arange(len(prompts), device=device), lengths - 1]
        return torch.stack(written), hidden

    def step(self, tokens: Tensor, lengths: Tensor, known: Sequence[int], cache: Cache) -> Tensor:
        """Logits Float32 "n V" after one more token in each of the first n rows. lengths: Int "n" and the same as a list, before it."""
        count, columns = len(known), max(known) + 1
        cache.reserve(columns)
        x = F.embedding(tokens, self.embedding)
        turns = self._turns_at(lengths)
        stored = cache.data[:, :, :count, :, :columns]
        newest = stored[:, :, :, :, columns - 1].transpose(1, 2).unbind()
        even = min(known) + 1 == columns
        rows, mask = torch.arange(count, device=tokens.device), None
        if not even:
            outside = torch.arange(columns, device=tokens.device) > lengths[:, None]
            mask = torch.zeros(outside.shape, dtype=self.compute_dtype, device=tokens.device).masked_fill_(outside, -torch.inf)[
                :, None, None
            ]
        for layer, (block, keys, values) in enumerate(zip(self.blocks, stored[:, 0].unbind(), stored[:, 1].unbind())):
            query, pair = self._heads(block, x, turns).split_with_sizes((self.heads, 2 * self.kv_heads), 1)
            pair = pair.view(count, 2, self.kv_heads, self.head_dim)
            if even:
                newest[layer].copy_(pair)
            else:
                stored[layer][:, rows, :, lengths] = pair
            # Query heads that share a key head are further queries to it.
            query = query.view(count, self.kv_heads, -1, self.head_dim)
            mixed = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=self.scaling)
            x = self._rest(block, x, mixed.reshape(count, -1))
        return self.logits(x)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.head(self._normed(hidden, self.norm)).float()

    def _turns_at(self, positions: Tensor) -> Tensor:
        """Complex "N heads D/2": what queries, keys and values at these positions are multiplied by; values by 1."""
        angles = positions[:, None, None].float() * self.frequencies
        turns = torch.polar(torch.full_like(angles, self.attention_scaling), angles)
        turned = self.heads + self.kv_heads
        return torch.cat([turns.expand(-1, turned, -1), turns.new_ones(1, 1, 1).expand(len(turns), self.kv_heads, turns.shape[-1])], 1)

    def _heads(self, block: Block, x: Tensor, turns: Tensor) -> Tensor:
        """Queries, keys and values "N heads D", turned to their positions."""
        out = block.qkv(self._normed(x, block.norm))
        if block.query_norm is not None and block.key_norm is not None:
            heads = out.unflatten(-1, (-1, self.head_dim)).split((self.heads, self.kv_heads, self.kv_heads), dim=1)
            out = torch.cat([block.query_norm(heads[0]), block.key_norm(heads[1]), heads[2]], 1)
        if out.dtype != torch.float32:
            out = out.float()
        turned = torch.view_as_real(torch.view_as_complex(out.view(len(x), -1, self.head_dim // 2, 2)) * turns)
        return self._computed(turned.view(len(x), -1, self.head_dim))

    def _normed(self, x: Tensor, norm: Norm) -> Tensor:
        return self._computed(norm(x))

    def _computed(self, x: Tensor) -> Tensor:
        return x if x.dtype == self.compute_dtype else x.to(self.compute_dtype)

    def _rest(self, block: Block, x: Tensor, mixed: Tensor) -> Tensor:
        x = block.out.added_to(x, mixed)
        gate, up = block.gate_up(self._normed(x, block.mlp_norm)).chunk(2, dim=-1)
        return block.down.added_to(x, F.silu(gate).mul_(up))
