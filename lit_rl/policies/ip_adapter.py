"""Style by image for FLUX (Calligrapher, Ma et al. 2025, arXiv 2506.24123; IP-Adapter, Ye et al. 2023, arXiv 2308.06721).

Features of a style image become tokens (`ImageProjection`), to which every attention of a stock `FluxTransformer2DModel` attends beside its
own (`StyleAttention`). Both are submodules of the transformer, so strategies shard and save them with it and its frozen copies have them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_rl.errors import ConfigError, listed

if TYPE_CHECKING:
    from diffusers.models._modeling_parallel import ParallelConfig
    from diffusers.models.attention_dispatch import AttentionBackendName
    from diffusers.models.transformers.transformer_flux import FluxAttention

FEATURES, TOKENS = "style_features", "style_tokens"
"""Keys of `joint_attention_kwargs`: Float "B F" for `ImageProjection`, or Float "B N C" that are tokens already."""

EPS = 1e-5
FROZEN = ".frozen."
"""In the names of a frozen copy's weights."""


class StyleAttention(nn.Module):
    """softmax(q k^T / sqrt(d)) v + scale * softmax(q' k_style^T / sqrt(d)) v_style, then the output projection.

    q' is the query before its rotation by position, for the image rows in double blocks and for text and image rows in single ones;
    k_style is RMS-normalized over the head's dimension without weights. Without tokens it computes what diffusers' own processor does, and
    tokens of zeros add exactly nothing (k = v = 0), so a row of zeros is a sample without style.
    """

    _attention_backend: AttentionBackendName | None = None  # the transformer's `set_attention_backend` looks for these two
    _parallel_config: ParallelConfig | None = None

    def __init__(self, width: int, context: int, *, scale: float = 1.0) -> None:
        """width: of the queries, heads * head dim; context: of the tokens. Starts at v_style = 0: the transformer as it was."""
        super().__init__()
        self.scale = scale
        self.frozen: StyleAttention | None = None
        self.frozen_is_active = False
        self.to_k_ip = nn.Linear(context, width, bias=False)
        self.to_v_ip = nn.Linear(context, width, bias=False)
        nn.init.zeros_(self.to_v_ip.weight)

    # `FluxAttention` passes on those arguments that it finds in the signature of `__call__`, and nn.Module's names none.
    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Tensor | tuple[Tensor] | None = None,
        style_tokens: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        from diffusers.models.embeddings import apply_rotary_emb

        heads = (-1, attn.head_dim)
        own = query = attn.norm_q(attn.to_q(hidden_states).unflatten(-1, heads))
        key = attn.norm_k(attn.to_k(hidden_states).unflatten(-1, heads))
        value = attn.to_v(hidden_states).unflatten(-1, heads)
        if encoder_hidden_states is not None:
            query = torch.cat([attn.norm_added_q(attn.add_q_proj(encoder_hidden_states).unflatten(-1, heads)), query], dim=1)
            key = torch.cat([attn.norm_added_k(attn.add_k_proj(encoder_hidden_states).unflatten(-1, heads)), key], dim=1)
            value = torch.cat([attn.add_v_proj(encoder_hidden_states).unflatten(-1, heads), value], dim=1)
        if image_rotary_emb is not None:
            query = apply_rotary_emb(query, image_rotary_emb, sequence_dim=1)
            key = apply_rotary_emb(key, image_rotary_emb, sequence_dim=1)
        out = self._attend(query, key, value, mask=attention_mask)
        text, image = (None, out) if encoder_hidden_states is None else out.tensor_split([encoder_hidden_states.shape[1]], dim=1)
        if style_tokens is not None:
            image = image + self.scale * self.style(own, style_tokens)
        if text is None:
            return image
        return attn.to_out[1](attn.to_out[0](image.contiguous())), attn.to_add_out(text.contiguous())

    def style(self, query: Tensor, tokens: Tensor) -> Tensor:
        """Attention of the queries Float "B L H D" to the style tokens Float "B N C": Float "B L H*D"."""
        if self.frozen_is_active:
            assert self.frozen is not None
            return self.frozen.style(query, tokens)
        tokens = tokens.to(self.to_k_ip.weight.dtype)
        key, value = (layer(tokens).unflatten(-1, query.shape[2:]) for layer in (self.to_k_ip, self.to_v_ip))
        key = F.rms_norm(key.float(), key.shape[-1:], eps=EPS)
        return self._attend(query, key.to(query.dtype), value.to(query.dtype))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None) -> Tensor:
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        out = dispatch_attention_fn(
            query, key, value, attn_mask=mask, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        return out.flatten(2, 3).to(query.dtype)


class MLPProjection(nn.Module):
    """Features Float "B F" -> LayerNorm(MLP(features) cut into N tokens) Float "B N C"; released: F 1152, N 128, C 4096."""

    def __init__(self, features: int, *, tokens: int, width: int) -> None:
        super().__init__()
        self.features = features
        self.proj = _mlp(features, tokens * width)
        self.norm = nn.LayerNorm(width)

    def forward(self, features: Tensor) -> Tensor:
        """Features Float "B F" -> tokens Float "B N C"."""
        return self.norm(self.proj(features).unflatten(-1, (-1, self.norm.normalized_shape[0])))


class QFormerProjection(nn.Module):
    """Learned queries attend to K tokens made of the features: LayerNorm(LayerNorm(attention + queries)) Float "B N C"; released: K 32."""

    def __init__(self, features: int, *, tokens: int, width: int, key_tokens: int = 32, heads: int = 8) -> None:
        super().__init__()
        self.query_embeds = nn.Parameter(torch.randn(tokens, width))
        self.id_proj = _mlp(features, key_tokens * width)
        self.cross_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.cross_attn_norm = nn.LayerNorm(width)
        self.norm = nn.LayerNorm(width)

    def forward(self, features: Tensor) -> Tensor:
        """Features Float "B F" -> tokens Float "B N C"."""
        keys = self.id_proj(features).unflatten(-1, (-1, self.query_embeds.shape[1]))
        queries = self.query_embeds.expand(len(features), -1, -1)
        attended, _ = self.cross_attn(queries, keys, keys, need_weights=False)
        return self.norm(self.cross_attn_norm(attended + queries))


class ImageProjection(nn.Module):
    """Style tokens = MLP(features) + Q-Former(features), where there is a Q-Former; features of zeros give tokens of zeros."""

    def __init__(self, mlp: MLPProjection, qformer: QFormerProjection | None = None) -> None:
        super().__init__()
        self.mlp = mlp
        self.qformer = qformer
        self.is_off = False  # then the network has no style, whatever features it gets
        self.frozen: ImageProjection | None = None
        self.frozen_is_active = False

    def forward(self, features: Tensor) -> Tensor:
        """Float "B F" -> Float "B N C". A sample without style has features of zeros, which no encoder gives to an image."""
        if self.frozen_is_active:
            assert self.frozen is not None
            return self.frozen(features)
        features = features.to(self.mlp.norm.weight.dtype)
        tokens = self.mlp(features) if self.qformer is None else self.mlp(features) + self.qformer(features)
        return tokens * features.any(dim=1).view(-1, 1, 1)

    @classmethod
    def like(cls, weights: Mapping[str, Mapping[str, Tensor]], *, heads: int = 8) -> ImageProjection:
        """A projection of the sizes that an adapter file has. heads: of the Q-Former, which no shape tells."""
        mlp = weights["image_proj"]
        features, width = mlp["proj.0.weight"].shape[1], len(mlp["norm.weight"])
        sizes = {"tokens": len(mlp["proj.2.bias"]) // width, "width": width}
        if "image_proj_qformer" not in weights:
            return cls(MLPProjection(features, **sizes))
        key_tokens = len(weights["image_proj_qformer"]["id_proj.2.bias"]) // width
        return cls(MLPProjection(features, **sizes), QFormerProjection(features, **sizes, key_tokens=key_tokens, heads=heads))


def add_ip_adapter(network: Any, projection: ImageProjection, *, scale: float = 1.0, seed: int = 0) -> None:
    """Give a stock FluxTransformer2DModel `projection` as `network.image_proj`, and style attention drawn from `seed` alone, in float32.

    Called with `joint_attention_kwargs={"style_features": Float "B F"}` it then projects them inside its own forward, where FSDP2 has
    the weights gathered; without, or with features of zeros, it is the stock network. Raises ConfigError when the tokens' width is not the
    text's.
    """
    blocks = flux_blocks(network)
    context, width = network.config.joint_attention_dim, projection.mlp.norm.normalized_shape[0]
    if width != context:
        raise ConfigError(f"style tokens are {width} wide, the transformer's text {context}: give the image projection width={context}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for block in blocks:
            weight = block.attn.to_q.weight
            block.attn.set_processor(StyleAttention(len(weight), context, scale=scale).to(weight.device))
    network.image_proj = projection
    network.register_forward_pre_hook(_project, with_kwargs=True)


def _project(network: nn.Module, args: tuple, kwargs: dict[str, object]) -> tuple[tuple, dict[str, object]]:
    joint = kwargs.get("joint_attention_kwargs")
    if not isinstance(joint, Mapping) or FEATURES not in joint:
        return args, kwargs
    rest = {key: value for key, value in joint.items() if key != FEATURES}
    projection = projection_of(network)
    tokens = {} if projection.is_off else {TOKENS: projection(joint[FEATURES])}
    return args, {**kwargs, "joint_attention_kwargs": {**rest, **tokens}}


def projection_of(network: nn.Module) -> ImageProjection:
    """The image projection that `add_ip_adapter` gave the network."""
    found = network.get_submodule("image_proj")
    assert isinstance(found, ImageProjection)
    return found


def style_attentions(network: nn.Module) -> list[StyleAttention]:
    """In the order of the files: double blocks, then single ones."""
    return [block.attn.processor for block in flux_blocks(network)]


def style_modules(network: nn.Module) -> list[ImageProjection | StyleAttention]:
    """The modules of the adapter: the image projection and every style attention."""
    return [projection_of(network), *style_attentions(network)]


def flux_blocks(network: Any) -> list[Any]:
    """Double blocks, then single ones."""
    return [*network.transformer_blocks, *network.single_transformer_blocks]


def adapter_names(network: nn.Module) -> dict[str, str]:
    """Parameter name in `network` -> "section.key" in a standard adapter file ("ip_adapter.0.to_k_ip.weight")."""
    homes: list[tuple[str, nn.Module | None]] = [
        ("image_proj", projection_of(network).mlp),
        ("image_proj_qformer", projection_of(network).qformer),
        ("ip_adapter", nn.ModuleList(style_attentions(network))),
    ]
    filed = {
        p: f"{section}.{key}" for section, home in homes if home is not None for key, p in home.named_parameters() if FROZEN not in key
    }
    return {name: filed[p] for name, p in network.named_parameters() if p in filed}


@torch.no_grad()
def load_ip_adapter(network: nn.Module, weights: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Copy the weights of a standard adapter file into `network`, before a strategy cuts it into shards.

    Raises ConfigError that lists what is missing, unknown or of another shape; nothing is copied then.
    """
    given = {f"{section}.{key}": tensor for section, part in weights.items() for key, tensor in part.items()}
    parameters = dict(network.named_parameters())
    wanted = {filed: parameters[name] for name, filed in adapter_names(network).items()}
    problems = {
        "missing": [key for key in wanted if key not in given],
        "unknown": [key for key in given if key not in wanted],
        "other shapes": [
            f"{key} {list(given[key].shape)} instead of {list(p.shape)}"
            for key, p in wanted.items()
            if key in given and given[key].shape != p.shape
        ],
    }
    if any(problems.values()):
        found = "; ".join(f"{what}: {listed(keys)}" for what, keys in problems.items() if keys)
        raise ConfigError(f"the IP-Adapter's weights are of another model than the transformer and its image projection; {found}")
    for key, parameter in wanted.items():
        parameter.copy_(given[key])


def _mlp(features: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(features, 2 * features), nn.GELU(), nn.Linear(2 * features, out))
