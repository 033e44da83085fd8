"""The way from a prompt to the conditions of DeepGen's transformer: a language model with learned queries, and a bridge after it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from lit_rl.checkpoints.deepgen import check_whole
from lit_rl.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EVERY = 6
"""Every sixth hidden state is fused, from the last layer's input downwards."""


class Condition(NamedTuple):
    """Conditions of U prompts, filled up with zeros behind the longest one."""

    sequence: Tensor  # Float "U L J"
    pooled: Tensor  # Float "U P"


class BridgeSizes(NamedTuple):
    """Sizes of a bridge that follow from its weights."""

    queries: int
    language: int  # width of the language model
    fused: int  # hidden states side by side
    hidden: int
    intermediate: int
    layers: int
    pooled: int
    sequence: int

    @classmethod
    def of(cls, weights: Mapping[str, Tensor], *, what: str) -> BridgeSizes:
        """Read off the weights' shapes. Raises ConfigError where one that tells a size is missing."""
        telling = {"meta_queries", "connector.layers.0.mlp.fc1.weight", *(f"projector_{i}.weight" for i in (1, 2, 3))}
        if absent := telling - weights.keys():
            raise ConfigError(f"{what} has no bridge from the language model to the transformer: {', '.join(sorted(absent))} missing")
        queries, language = weights["meta_queries"].shape
        hidden, width = weights["projector_1.weight"].shape
        layers = len({name.split(".")[2] for name in weights if name.startswith("connector.layers.")})
        wide = len(weights["connector.layers.0.mlp.fc1.weight"])
        ends = (len(weights["projector_2.weight"]), len(weights["projector_3.weight"]))
        return cls(queries, language, width // language, hidden, wide, layers, *ends)


class Queries(nn.Module):
    """Learned vectors behind the text; a module of its own, so that strategies gather them for its forward."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(count, width))

    def forward(self, rows: int) -> Tensor:
        """Float "U Q D", the same for every row."""
        return self.weight.expand(rows, -1, -1)


class Bridge(nn.Module):
    """Fused hidden states -> `projector_1` -> connector -> conditions by `projector_3` (sequence) and `projector_2` (their mean)."""

    def __init__(self, sizes: BridgeSizes, *, heads: int) -> None:
        from transformers import SiglipVisionConfig
        from transformers.models.siglip.modeling_siglip import SiglipEncoder

        super().__init__()
        config = SiglipVisionConfig(
            hidden_size=sizes.hidden,
            intermediate_size=sizes.intermediate,
            num_hidden_layers=sizes.layers,
            num_attention_heads=heads,
            hidden_act="gelu_pytorch_tanh",
            layer_norm_eps=1e-6,
        )
        config._attn_implementation = "sdpa"  # takes a mask of what is seen; the default would add it
        self.sizes = sizes
        self.queries = Queries(sizes.queries, sizes.language)
        self.projector_1 = nn.Linear(sizes.fused * sizes.language, sizes.hidden)
        encoder: Callable[..., nn.Module] = SiglipEncoder
        self.connector = encoder(config)
        self.projector_2 = nn.Linear(sizes.hidden, sizes.pooled)
        self.projector_3 = nn.Linear(sizes.hidden, sizes.sequence)

    def forward(self, fused: Tensor, real: Tensor | None = None) -> Condition:
        """fused: Float "U L F". real: Bool "U L", tokens that do not just fill up; None: all. The others are neither seen nor averaged."""
        if not torch.is_autocast_enabled(fused.device.type):
            fused = fused.to(self.projector_1.weight.dtype)
        seen = None if real is None else real[:, None, None].expand(-1, -1, real.shape[1], -1)
        x = self.connector(inputs_embeds=self.projector_1(fused), attention_mask=seen).last_hidden_state
        if real is None:
            return Condition(self.projector_3(x), self.projector_2(x.mean(1)))
        kept = torch.where(real[..., None], x, 0.0)
        sequence = torch.where(real[..., None], self.projector_3(x), 0.0)
        return Condition(sequence, self.projector_2(kept.sum(1) / real.sum(1, keepdim=True)))


class Conditioner(nn.Module):
    """Token ids -> conditions, in one forward: strategies that cut it into shards gather each part for it.

    `frozen` is a copy of the bridge as reference, see `lit_rl.policies.deepgen_parts`.
    """

    def __init__(self, language: PreTrainedModel, bridge: Bridge) -> None:
        super().__init__()
        depth = len(blocks_of(language))
        self.states = list(range(depth - 1, 0, -EVERY))[: bridge.sizes.fused]
        width = embedding_of(language).embedding_dim
        if len(self.states) < bridge.sizes.fused or width != bridge.sizes.language:
            raise ConfigError(
                f"language_model: it has {depth} layers of width {width}, and the checkpoint's bridge fuses {bridge.sizes.fused} states of "
                f"width {bridge.sizes.language}: give the model that it was trained with"
            )
        self.language = without_last(language)
        self.bridge = bridge
        self.frozen: Bridge | None = None
        self.frozen_is_active = False

    def forward(self, ids: Tensor, lengths: Sequence[int]) -> Condition:
        """ids: Int "U L" of prompts, filled up behind with anything. lengths: U, tokens of each.

        The queries come right behind each prompt and nothing looks ahead, so no row depends on how far the others reach.
        """
        bridge = self.frozen if self.frozen is not None and self.frozen_is_active else self.bridge
        embeds = embedding_of(self.language)(ids)
        both = torch.cat([embeds, bridge.queries(len(ids)).to(embeds.dtype)], 1)
        real = None
        if len(set(lengths)) > 1:
            until = torch.tensor(lengths, device=ids.device)[:, None]
            place = torch.arange(both.shape[1], device=ids.device)
            text = (place < until) | (place >= ids.shape[1])
            both = both.take_along_dim((~text).to(torch.uint8).argsort(dim=1, stable=True)[..., None], 1)
            real = place < until + bridge.sizes.queries
        found = self.language(inputs_embeds=both, use_cache=False, output_hidden_states=True).hidden_states
        return bridge(torch.cat([found[i] for i in self.states], -1), real)


def load_bridge(bridge: Bridge, weights: Mapping[str, Tensor], *, what: str) -> None:
    """Fill a bridge with a checkpoint's tensors. Raises ConfigError that lists what is missing, unknown or of another shape."""
    named = {inner_name(name): tensor for name, tensor in weights.items()}
    own = bridge.state_dict()
    check_whole(named, own, what=what)
    if odd := [name for name, tensor in named.items() if tensor.shape != own[name].shape]:
        raise ConfigError(f"{what}: {odd[0]} is {list(named[odd[0]].shape)} there and {list(own[odd[0]].shape)} here")
    bridge.load_state_dict(named)


def inner_name(name: str) -> str:
    """A name of the checkpoint as `Bridge` has it."""
    return "queries.weight" if name == "meta_queries" else name


def outer_name(name: str) -> str:
    """The inverse of `inner_name`."""
    return "meta_queries" if name == "queries.weight" else name


def embedding_of(language: PreTrainedModel) -> nn.Embedding:
    """The table of a text decoder's tokens."""
    table = language.get_input_embeddings()
    assert isinstance(table, nn.Embedding), "adapters of the embedding are part of it"
    return table


def blocks_of(language: nn.Module) -> list[nn.Module]:
    """The layers of a text decoder."""
    return list(language.get_submodule("layers").children())


def without_last(language: PreTrainedModel) -> PreTrainedModel:
    """The decoder without what no fused state depends on: its last layer and the norm behind it."""
    language.layers = nn.ModuleList(blocks_of(language)[:-1])
    language.norm = nn.Identity()
    return language


def frozen_copy(bridge: Bridge, dtype: torch.dtype) -> Bridge:
    """A copy that nothing trains, in `dtype`."""
    return copy.deepcopy(bridge).requires_grad_(False).to(dtype)
