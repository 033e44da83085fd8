"""The forward pass of Qwen2, Qwen3 and Llama over fused copies of their weights, with a key-value cache and no module in between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_rl.policies.weights.shards import readable
from lit_rl.rollouts.cache import Cache, Seen, Siblings
from lit_rl.rollouts.fused import Fused, Norm, fuse, interleaved
from lit_rl.rollouts.room import LOGIT_BYTES, Need

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
    def need(self) -> Need:
        """Memory that answers take."""
        numbers = self.kv_heads * self.head_dim
        token = 2 * len(self.blocks) * numbers * self.compute_dtype.itemsize
        return Need(token=token, logits=LOGIT_BYTES * self.head.weight.shape[1], numbers=numbers)

    def cache(self, *, rows: int, columns: int, places: int, prompt: int) -> Cache:
        """Room for so many rows, and for so many prompts beside them, of so many tokens each."""
        sizes = {"layers": len(self.blocks), "heads": self.kv_heads, "size": self.head_dim}
        like = self.embedding.new_empty(0, dtype=self.compute_dtype)
        return Cache(**sizes, rows=rows, columns=columns, places=places, prompt=prompt, like=like)

    def prefill(self, prompts: Sequence[Sequence[int]], at: Sequence[int], cache: Cache) -> Tensor:
        """Read prompts into these places or rows of the cache. Logits Float32 "prompts V" after the last token of each."""
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        last: list[Tensor] = [self.embedding] * len(prompts)
        while order:
            width = len(prompts[order[0]])
            some, order = order[: max(1, PREFILL_TOKENS // width)], order[max(1, PREFILL_TOKENS // width) :]
            hidden = self._prefill([prompts[i] for i in some], [at[i] for i in some], cache)
            for row, i in enumerate(some):
                last[i] = hidden[row]
        return self.logits(torch.stack(last))

    def _prefill(self, prompts: Sequence[Sequence[int]], at: Sequence[int], cache: Cache) -> Tensor:
        """Hidden states "prompts D" of the last tokens. Padded on the right, where causal attention never looks from a real token."""
        width = max(map(len, prompts))
        tokens = torch.zeros(len(prompts), width, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = torch.tensor(prompt)
        device = self.embedding.device
        lengths, where = torch.tensor([[len(prompt) for prompt in prompts], list(at)]).to(device)
        x = F.embedding(tokens.to(device), self.embedding).flatten(0, 1)
        turns = self._turns_at(torch.arange(width, device=device).repeat(len(prompts)))
        for layer, block in enumerate(self.blocks):
            heads = self._heads(block, x, turns).unflatten(0, (-1, width)).transpose(1, 2)
            query, key, value = heads.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
            cache.put(layer, where, torch.stack([key, value]))
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=1.0, enable_gqa=self.heads != self.kv_heads)
            x = self._rest(block, x, mixed.transpose(1, 2).reshape(len(x), -1))
        return x.view(len(prompts), width, -1)[torch.arange(len(prompts), device=device), lengths - 1]

    def step(
        self, tokens: Tensor, positions: Tensor, cache: Cache, siblings: Siblings | None, *, newest: int, columns: Tensor | None = None
    ) -> Tensor:
        """Logits Float32 "n V" after one more token in each of the first n rows.

        positions: Int "n", of these tokens in their sequences. newest: the largest of their columns in the cache. columns: Int "n", all of
        them; None where they are the same.
        """
        count = len(tokens)
        cache.reserve(newest + 1)
        x = F.embedding(tokens, self.embedding)
        turns = self._turns_at(positions)
        rows = torch.arange(count, device=tokens.device)
        hidden = None if columns is None else torch.arange(newest + 1, device=tokens.device) > columns[:, None]
        seen = Seen.of(cache, siblings, count, newest + 1, hidden)
        last = cache.own[:, :, :count, :, newest].transpose(1, 2).unbind()
        for layer, block in enumerate(self.blocks):
            query, pair = self._heads(block, x, turns).split_with_sizes((self.heads, 2 * self.kv_heads), 1)
            pair = pair.view(count, 2, self.kv_heads, self.head_dim)
            if columns is None:
                last[layer].copy_(pair)
            else:
                seen.own[layer][:, rows, :, columns] = pair
            # Query heads that share a key head are further queries to it.
            mixed = seen.attend(layer, query.view(count, self.kv_heads, -1, self.head_dim))
            x = self._rest(block, x, mixed.reshape(count, -1))
        return self.logits(x)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.head(self._normed(hidden, self.norm)).float()

    def _turns_at(self, positions: Tensor) -> Tensor:
        """Complex "N heads D/2": what queries, keys and values at these positions are multiplied by; queries scaled, values by 1."""
        angles = positions[:, None, None].float() * self.frequencies
        turns = torch.polar(torch.full_like(angles, self.attention_scaling), angles)
        unturned = turns.new_ones(1, 1, 1).expand(len(turns), self.kv_heads, turns.shape[-1])
        return torch.cat([(turns * self.scaling).expand(-1, self.heads, -1), turns.expand(-1, self.kv_heads, -1), unturned], 1)

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
