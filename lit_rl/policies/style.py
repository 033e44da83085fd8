"""The style of a reference image beside a Fill pipeline: its settings, its adapter, its reference, its pictures."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_rl.checkpoints.ip_adapter import Weights
from lit_rl.errors import ConfigError
from lit_rl.policies.ip_adapter import (
    ImageProjection,
    MLPProjection,
    QFormerProjection,
    StyleAttention,
    add_ip_adapter,
    load_ip_adapter,
    projection_of,
    style_modules,
)
from lit_rl.policies.pretrained import Pipeline
from lit_rl.policies.unread import frozen_of, leaves_weights
from lit_rl.policies.weights.reference import Reference, Referenced
from lit_rl.policies.weights.shards import local, reshard


@dataclass(kw_only=True)
class StyleSettings:
    """Style tokens from the features of a SigLIP vision encoder.

    encoder: its folder or hub id. initial: a standard, legacy or released adapter file to start from, whose sizes hold then; None draws a
    new adapter that says nothing yet, with `tokens` style tokens, and a Q-Former over `key_tokens` keys beside the MLP if `qformer`.
    heads: of the Q-Former, which no file tells. scale: weight of the style in every attention.
    """

    encoder: str
    initial: str | None = None
    tokens: int = 128
    qformer: bool = False
    key_tokens: int = 32
    heads: int = 8
    scale: float = 1.0

    def __post_init__(self) -> None:
        if min(self.tokens, self.key_tokens, self.heads) < 1:
            raise ConfigError(f"style: tokens, key_tokens and heads must be at least 1, got {self.tokens}, {self.key_tokens}, {self.heads}")
        if self.initial is not None and not Path(self.initial).expanduser().is_file():
            raise ConfigError(f"style.initial: no such file {self.initial!r}")


class StyleOff(Reference):
    """The network without its style adapter. It needs no memory and cannot be refreshed."""

    @contextmanager
    def active(self, policy: Referenced) -> Iterator[None]:
        """Inside it the network answers without style."""
        projection = projection_of(policy.network)
        before, projection.is_off = projection.is_off, True
        try:
            yield
        finally:
            projection.is_off = before


class FrozenStyle(Reference):
    """A frozen copy of the style adapter in the modules of the trained one, which answer with it while it is active."""

    def add(self, policy: Referenced, *, dtype: torch.dtype) -> None:
        """Copy the style adapter into each of its own modules."""
        for module in style_modules(policy.network):
            module.frozen = copy.deepcopy(module).requires_grad_(False)

    @contextmanager
    def active(self, policy: Referenced) -> Iterator[None]:
        """Inside it the copies answer in place of the modules that hold them."""
        modules = style_modules(policy.network)
        before = [module.frozen_is_active for module in modules]
        try:
            for module in modules:
                module.frozen_is_active = True
            yield
        finally:
            for module, was_active in zip(modules, before):
                module.frozen_is_active = was_active

    @torch.no_grad()
    def refresh(self, policy: Referenced) -> None:
        """The copies <- the adapter as it is now; local shards when sharded."""
        reshard(policy.network)
        for module in style_modules(policy.network):
            assert module.frozen is not None, "the constructor has made the copies"
            for name, parameter in module.frozen.named_parameters():
                local(parameter).copy_(local(module.get_parameter(name)))

    def bytes(self, policy: Referenced) -> int:
        """The style adapter again, in float32."""
        return sum(p.nbytes for module in style_modules(policy.network) if module.frozen is not None for p in module.frozen.parameters())


# ---------------------------------------------------------------------- the adapter
def add_style(pipe: Pipeline, style: StyleSettings, weights: Weights | None, *, dtype: torch.dtype) -> None:
    """Give a Fill pipeline the vision encoder, in `dtype`, and its transformer the style adapter: that of a file, or a new one."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    # An attribute, not a component: it is moved with the other frozen parts and not saved.
    if leaves_weights():
        encoder = frozen_of(SiglipVisionModel._from_config, SiglipVisionConfig.from_pretrained(style.encoder), dtype=dtype)
    else:
        encoder = SiglipVisionModel.from_pretrained(style.encoder, dtype=dtype).requires_grad_(False).eval()
    pipe.style_encoder = encoder
    features, width = encoder.config.hidden_size, pipe.transformer.config.joint_attention_dim
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed())
        projection = ImageProjection.like(weights, heads=style.heads) if weights else _new_projection(style, features, width)
    if (projected := projection.mlp.features) != features:
        raise ConfigError(f"style.initial: {style.initial!r} projects {projected} features, the encoder {style.encoder!r} has {features}")
    add_ip_adapter(pipe.transformer, projection, scale=style.scale, seed=torch.initial_seed())
    if weights:
        load_ip_adapter(pipe.transformer, weights)


def count_new_adapter(style: StyleSettings, *, features: int, transformer: Mapping[str, int]) -> int:
    """Weights of the adapter that `style` draws beside a transformer of this config. features: width of the encoder's."""
    context, width = transformer["joint_attention_dim"], transformer["num_attention_heads"] * transformer["attention_head_dim"]
    with torch.device("meta"):
        projection, attention = _new_projection(style, features, context), StyleAttention(width, context)
    blocks = transformer["num_layers"] + transformer["num_single_layers"]
    return sum(p.numel() for p in projection.parameters()) + blocks * sum(p.numel() for p in attention.parameters())


def _new_projection(style: StyleSettings, features: int, width: int) -> ImageProjection:
    mlp = MLPProjection(features, tokens=style.tokens, width=width)
    if not style.qformer:
        return ImageProjection(mlp)
    qformer = QFormerProjection(features, tokens=style.tokens, width=width, key_tokens=style.key_tokens, heads=style.heads)
    return ImageProjection(mlp, qformer)


# ---------------------------------------------------------------------- pictures
def strip(reference: Tensor, height: int, width: int) -> Tensor:
    """uint8 "3 h w" -> uint8 "3 height width": scaled to the width; a higher one to the height instead, in the middle of black.

    Black is above a lower one, so that it touches the image below. A height that is off by at most 8 pixels is stretched: Calligrapher
    takes the nearest multiple of 16.
    """
    have, wide = reference.shape[1:]
    scale = min(width / wide, height / have)
    new = [max(1, round(have * scale)), max(1, round(wide * scale))]
    if abs(round(have * width / wide) - height) <= 8:
        new = [height, width]
    scaled = F.interpolate(reference[None].float(), size=new, mode="bilinear", antialias=True)[0].round().clamp(0, 255).to(torch.uint8)
    left = (width - new[1]) // 2
    return F.pad(scaled, (left, width - new[1] - left, height - new[0], 0))


def letterbox(image: Tensor, side: int) -> Tensor:
    """uint8 "3 h w" -> Float "3 side side" in [0, 1]: scaled to fit (bicubic), in the middle of a black square."""
    height, width = image.shape[1:]
    longest = max(height, width)
    new = [max(1, round(length * side / longest)) for length in (height, width)]
    scaled = F.interpolate(image[None].float() / 255, size=new, mode="bicubic", antialias=True)[0].clamp(0, 1)
    above, left = ((side - length) // 2 for length in new)
    return F.pad(scaled, (left, side - new[1] - left, above, side - new[0] - above))
