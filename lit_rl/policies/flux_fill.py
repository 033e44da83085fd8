"""FLUX.1-Fill (Black Forest Labs 2024), with the style of a reference image injected (Calligrapher, Ma et al. 2025, arXiv 2506.24123)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_rl.checkpoints.ip_adapter import Format, read_ip_adapter, to_sections, write_ip_adapter
from lit_rl.errors import ConfigError
from lit_rl.policies.flux import FluxPolicy
from lit_rl.policies.ip_adapter import FEATURES, FROZEN, adapter_names, projection_of
from lit_rl.policies.pretrained import Pipeline
from lit_rl.policies.style import FrozenStyle, StyleOff, StyleSettings, add_style, letterbox, strip
from lit_rl.policies.weights.reference import Combined
from lit_rl.types import Cond, Info

ADAPTER_FILE = "ip-adapter.bin"


class FluxFillPolicy(FluxPolicy):
    """Paints the white part of a mask as the prompt says, in the style of an image.

    A token is 4C noisy latents, 4C latents of the image with the masked part greyed, and 4 f^2 mask pixels (C channels, f pixels per
    latent cell; 64 + 64 + 256 for FLUX.1-Fill-dev). To show the style to the base model too, the reference stands in a strip above
    the source, unmasked. The network paints both; `decode` cuts the strip off.

    Args:
        style: Inject style; None is plain FLUX.1-Fill.
        train: "adapter" trains the style adapter, and LoRA beside it where `lora` is set; "full" every weight.
        context_height: Pixels of the strip, of the same width as the image; 0 for none.

    `reference()` is the base model without LoRA and without style; with `keep_reference` it is a frozen copy of what is trained.
    The rest as in `FluxPolicy`.
    """

    pipeline: ClassVar[str] = "FluxFillPipeline"

    def __init__(
        self,
        pretrained: str,
        *,
        style: StyleSettings | None = None,
        train: Literal["adapter", "full"] = "adapter",
        context_height: int = 0,
        guidance_scale: float = 30.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(pretrained, guidance_scale=guidance_scale, **kwargs)
        self.image_size, cell = self.resolution, self._cell_of_folder(self.folder) if self.folder else 1
        if context_height < 0 or context_height % cell:
            raise ConfigError(
                f"policy.context_height={context_height} must be a multiple of {cell} pixels for this model, or 0 for no strip"
            )
        self.resolution = self.image_size[0] + context_height, self.image_size[1]  # of what the network paints
        if train == "adapter" and style is None and self.lora is None:
            raise ConfigError("nothing to train: set policy.style, policy.lora, or policy.train to full")
        if train == "full" and self.lora is not None:
            raise ConfigError("policy.train: full trains every weight, which leaves nothing to LoRA; leave policy.lora out or set adapter")
        self.style = style
        self.train_what = train
        self.context_height = context_height
        if style is not None and train == "adapter":
            without_style = FrozenStyle() if self.keep_reference else StyleOff()
            self.reference_weights = Combined(without_style, *((self.reference_weights,) if self.lora else ()))

    @property
    def full(self) -> bool:
        """Every weight is trained, those of a style adapter too."""
        return self.train_what == "full"

    # ------------------------------------------------------------------ loading
    def load(self) -> None:
        """Read the weights as `DiffusersFlowPolicy` does, and train the style adapter where there is one."""
        if "network" in self._modules:
            return
        super().load()
        if self.style and not self.full:
            if self.lora is None:
                self.network.requires_grad_(False)
            for name in adapter_names(self.network):
                self.network.get_parameter(name).requires_grad_(True)

    def _read_pipeline(self) -> Pipeline:
        initial = read_ip_adapter(self.style.initial) if self.style and self.style.initial else None  # errors before minutes of reading
        pipe = super()._read_pipeline()
        channels, have = 4 * (2 * pipe.vae.config.latent_channels + self._factor(pipe) ** 2), pipe.transformer.config.in_channels
        if have != channels:
            raise ConfigError(
                f"pretrained: {self.pretrained!r} has a transformer of {have} channels in; with its VAE, Fill needs {channels}"
            )
        if self.style:
            add_style(pipe, self.style, initial, dtype=self.dtype)
        return pipe

    @staticmethod
    def _factor(pipe: Pipeline) -> int:
        return 2 ** (len(pipe.vae.config.block_out_channels) - 1)

    # ------------------------------------------------------------------ conditioning
    def condition(self, info: Sequence[Info]) -> Cond:
        """U prompts with their images -> conditioning. Raises ConfigError that names the entry and the field that is not as it should be.

        prompt: str. source: uint8 "3 H W". mask: uint8 "H W", white is painted. reference: uint8 "3 h w" of any size, which gives the
        style and stands in the strip. styled: False takes the style away from this prompt and leaves the strip; default True.
        """
        for row in info:
            self._check_images(row)
        cond = super().condition(info)
        source, mask = torch.stack([row["source"] for row in info]), torch.stack([row["mask"] for row in info])[:, None]
        cond["fill"] = self.fill(self.canvas(source, info), F.pad(mask, (0, 0, self.context_height, 0)))
        if self.style:
            cond[FEATURES] = self.style_features([row["reference"] if row.get("styled", True) else None for row in info])
        return cond

    def condition_shapes(self, before: int = 0) -> dict[str, tuple[int, ...]]:
        """The shapes of `FluxPolicy`, the channels beside the noisy latents, and the style's features."""
        length, channels = self.latent_shape()
        shapes = super().condition_shapes(before) | {"fill": (length, self._pipe.transformer.config.in_channels - channels)}
        return shapes | ({FEATURES: (self._pipe.style_encoder.config.hidden_size,)} if self.style else {})

    def condition_key(self, info: Info) -> Hashable:
        """The prompt object itself: its images are not compared."""
        return id(info)  # siblings share the object

    def _check_images(self, row: Info) -> None:
        height, width = self.image_size
        fields: dict[str, tuple[int | str, ...]] = {"source": (3, height, width), "mask": (height, width)}
        if self.style or self.context_height:
            fields["reference"] = (3, "h", "w")
        for field, shape in fields.items():
            found = row.get(field)
            fits = isinstance(found, Tensor) and found.dtype == torch.uint8 and found.ndim == len(shape) and found.numel()
            if not fits or any(have != want for have, want in zip(row[field].shape, shape) if want not in ("h", "w")):
                what = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
                wanted = f"uint8 [{', '.join(map(str, shape))}]"
                raise ConfigError(f"prompt {row.get('prompt')!r}: {field} must be {wanted} for this policy's resolution, is {what}")

    def canvas(self, images: Tensor, info: Sequence[Info]) -> Tensor:
        """Images uint8 "B 3 H W" under the strips of their references: uint8 "B 3 context_height+H W"."""
        if not self.context_height:
            return images
        strips = [strip(row["reference"], self.context_height, images.shape[-1]) for row in info]
        return torch.cat([torch.stack(strips).to(images.device), images], dim=2)

    def encode_images(self, images: Tensor, info: Sequence[Info] = ()) -> Tensor:
        """As in `FluxPolicy`, each under the strip of its prompt's reference."""
        return super().encode_images(self.canvas(images, info))

    def fill(self, source: Tensor, mask: Tensor) -> Tensor:
        """Images uint8 "B 3 H W", masks uint8 "B 1 H W" -> the channels beside the noisy latents: Float "B L 4C+4f^2".

        The posterior's mode, where the pipeline draws from it: the same image has the same conditioning at every step.
        """
        white = (mask.to(self.device) > 127).float()
        z = self.frozen.latents((source.to(self.device).float() / 255 * 2 - 1) * (1 - white))
        return torch.cat([self.pack(z), self.pack(F.pixel_unshuffle(white, self.vae_factor))], dim=-1)

    def style_features(self, images: Sequence[Tensor | None]) -> Tensor:
        """SigLIP's pooled features Float "B F" of uint8 "3 h w" images, put on a black square; zeros for None."""
        encoder = self._pipe.style_encoder
        given = {i: image for i, image in enumerate(images) if image is not None}
        features = torch.zeros(len(images), encoder.config.hidden_size, device=self.device)
        if given:
            squares = torch.stack([letterbox(image.to(self.device), encoder.config.image_size) for image in given.values()])
            with self.frozen.on_device(("style_encoder",), self.device, offload=self.frozen.offload_text_encoders):
                features[[*given]] = encoder(pixel_values=(squares * 2 - 1).to(self.dtype)).pooler_output.float()
        return features

    # ------------------------------------------------------------------ the network
    def tokens(self, x: Tensor, cond: Cond) -> Tensor:
        """Noisy latents with the masked image and the mask beside them."""
        return torch.cat([x, cond["fill"].to(x.dtype)], dim=-1)

    def attention_inputs(self, cond: Cond) -> dict[str, Tensor] | None:
        """The style's features, which the network projects itself."""
        return {FEATURES: cond[FEATURES]} if self.style else None

    def decode(self, x: Tensor) -> Tensor:
        """Images without the strip above them."""
        return super().decode(x)[:, :, self.context_height :]

    # ------------------------------------------------------------------ saving
    def checkpoint_keys(self) -> set[str]:
        """The style adapter with its frozen copy, and LoRA; everything in a full fine-tune."""
        if self.full or self.style is None:
            return super().checkpoint_keys()
        adapter = {f"network.{name}" for name in adapter_names(self.network)} | {key for key in self.state_dict() if FROZEN in key}
        return adapter | (super().checkpoint_keys() if self.lora else set())

    def check_format(self, format: str) -> None:
        """Raise ConfigError where this adapter has no place in a file of that format."""
        if self.style is None:
            super().check_format(format)
        if format == "legacy" and projection_of(self.network).qformer is not None:
            raise ConfigError("Export format=legacy has no place for the Q-Former of this adapter: set it to released or standard")

    def save(self, folder: Path, weights: dict[str, Tensor], *, format: Format = "standard") -> None:
        """`ip-adapter.bin` in the keys of `format`, beside what `FluxPolicy` writes: LoRA, or the whole pipeline (without the adapter)."""
        names = {f"network.{name}": filed for name, filed in adapter_names(self.network).items()} if self.style else {}
        rest = {name: tensor for name, tensor in weights.items() if name not in names}
        if rest:
            super().save(folder, rest)
        if names:
            sections = to_sections({names[n]: tensor for n, tensor in weights.items() if n in names})
            write_ip_adapter(folder / ADAPTER_FILE, sections, format=format)
