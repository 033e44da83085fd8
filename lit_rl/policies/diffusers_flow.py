"""Base of the policies around a diffusers pipeline: loading, LoRA, geometry, saving."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lit_rl.errors import ConfigError
from lit_rl.policies.base import FlowPolicy
from lit_rl.policies.frozen import FrozenParts, read_pipeline
from lit_rl.policies.pretrained import Pipeline, check_pretrained, check_resolution, component_config, vae_factor, whole_numbers
from lit_rl.policies.trained import TrainedPolicy
from lit_rl.policies.weights.lora import LoraSettings, add_lora, base_name
from lit_rl.policies.weights.pipeline_lora import load_initial, save_adapter, split_adapter
from lit_rl.samplers.schedules import flux_mu
from lit_rl.types import Cond, Info

Dtype = Literal["float32", "bfloat16", "float16"]

POLICIES = {
    "StableDiffusion3Pipeline": "lit_rl.policies.sd3.SD3Policy",
    "FluxPipeline": "lit_rl.policies.flux.FluxPolicy",
    "FluxFillPipeline": "lit_rl.policies.flux_fill.FluxFillPolicy",
}


class DiffusersFlowPolicy(TrainedPolicy, FlowPolicy):
    """A diffusers text-to-image pipeline whose transformer predicts a velocity.

    Args:
        pretrained: Folder in diffusers format, or hub id (owner/name). Or the folder of an adapter that an earlier run exported: its base
            is read, and `lora.initial` is that folder.
        resolution: Side of the images in pixels, or (height, width).
        guidance_scale: Weight of guidance, as the pipeline understands it.
        max_sequence_length: Tokens of the T5 encoder; 0 only for a pipeline without one.
        lora, keep_reference: See `TrainedPolicy`.
        gradient_checkpointing: Recompute each block in the backward pass.
        compile: `torch.compile` each block; None = on an NVIDIA GPU where it pays, see `lit_rl.policies.by_device.Place`.
        dtype: Of the frozen weights: text encoders, and with LoRA the base network. Adapters are float32 always.
        vae_dtype: Of the VAE. Images that are not finite in 16 bits, in which some VAEs overflow, are decoded again in float32.
        offload_text_encoders: Keep the text encoders on the CPU between two calls of `encode`.
        offload_vae: Likewise for the VAE.
        vae_slice: Images decoded (or encoded) at once.
        cache_prompts: Encoded prompts remembered in CPU memory, the least recently used one leaving first (SD3: 2 to 5 MB each).
        revision: Of a hub repository.
        variant: Of the weight files, e.g. "fp16".

    Raises ValueError for what can be seen to be wrong before any weight is read.
    """

    pipeline: ClassVar[str]
    lora_targets: ClassVar[list[str]]

    stored_with: Sequence[str] = ("resolution", "guidance_scale", "max_sequence_length", "dtype")

    def __init__(
        self,
        pretrained: str,
        *,
        resolution: int | tuple[int, int] = 512,
        guidance_scale: float = 1.0,
        max_sequence_length: int = 256,
        lora: LoraSettings | None = None,
        keep_reference: bool = False,
        gradient_checkpointing: bool = False,
        compile: bool | None = None,
        dtype: Dtype = "float32",
        vae_dtype: Dtype = "float32",
        offload_text_encoders: bool = True,
        offload_vae: bool = False,
        vae_slice: int = 8,
        cache_prompts: int = 512,
        revision: str | None = None,
        variant: str | None = None,
    ) -> None:
        pretrained, lora = split_adapter(pretrained, lora)
        super().__init__(lora=lora, keep_reference=keep_reference)
        if guidance_scale < 0:
            raise ConfigError(f"guidance_scale: must not be negative, got {guidance_scale}; 1 is no guidance")
        if not 0 <= max_sequence_length <= 512:
            raise ConfigError(f"max_sequence_length: must be in 0..512, got {max_sequence_length}")
        if lora is not None and lora.targets == "all-linear":
            raise ConfigError("lora.targets: all-linear is for language models; leave it out for this family's list, or name modules")
        if vae_slice < 1:
            raise ConfigError(f"vae_slice: must be at least 1, got {vae_slice}")
        if cache_prompts < 0:
            raise ConfigError(f"cache_prompts: must not be negative, got {cache_prompts}; 0 remembers nothing")
        self.folder = self.checked_folder(pretrained)
        self.resolution = check_resolution(resolution, cell=self._cell_of_folder(self.folder) if self.folder else None)
        self.pretrained = pretrained
        self.guidance_scale = guidance_scale
        self.max_sequence_length = max_sequence_length
        self.gradient_checkpointing = gradient_checkpointing
        self.compile_blocks = compile
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.vae_dtype: torch.dtype = getattr(torch, vae_dtype)
        self.offload = {"offload_text_encoders": offload_text_encoders, "offload_vae": offload_vae}
        self.vae_slice = vae_slice
        self.cache_prompts = cache_prompts
        self.source = {"revision": revision, "variant": variant}

    @classmethod
    def checked_folder(cls, pretrained: str) -> Path | None:
        """The folder of the pipeline, None for a hub id. Raises ConfigError where it holds something else."""
        return check_pretrained(pretrained, pipeline=cls.pipeline, policies=POLICIES)

    # ------------------------------------------------------------------ what a family says
    @staticmethod
    @abstractmethod
    def tokens_side(transformer: Mapping[str, int]) -> int:
        """Latent cells along one side of a token, from the transformer's config."""

    @abstractmethod
    def encode_one(self, prompt: str) -> Cond:
        """One prompt -> its conditioning, each tensor with one row."""

    @abstractmethod
    def pack(self, z: Tensor) -> Tensor:
        """Latents as the VAE has them, "B C h w" -> as the network takes them, "B *D"."""

    @abstractmethod
    def unpack(self, x: Tensor) -> Tensor:
        """The inverse of `pack`."""

    # ------------------------------------------------------------------ loading
    def load(self) -> None:
        """Read the weights (on the CPU). Call it outside of any context that re-places new modules, such as `deepspeed.zero.Init`."""
        if "network" in self._modules:
            return
        pipe = self._read_pipeline()
        self._pipe: Pipeline = pipe  # no nn.Module, so that nobody shards, moves or saves what is frozen in it
        self.frozen = FrozenParts(pipe, **self.offload, vae_slice=self.vae_slice, cache_prompts=self.cache_prompts)
        check_resolution(self.resolution, cell=self.vae_factor * self.tokens_side(pipe.transformer.config))
        self._network_class = type(pipe.transformer)
        self.set_network(pipe.transformer, add=self._add_adapter, dtype=self.dtype)
        for network in self.networks():
            if self.gradient_checkpointing:
                self.recompute(network)
        if self.compile_blocks:
            self.compile_each(dynamic=False)

    def recompute(self, network: nn.Module) -> None:
        """Have each block of a network keep no activations for the backward pass."""
        network.enable_gradient_checkpointing()  # type: ignore[operator]

    def _add_adapter(self, lora: LoraSettings) -> None:
        if lora.initial:
            load_initial(self._pipe, lora)
        else:
            add_lora(self.network, lora, targets=lora.named or self.lora_targets, seed=torch.initial_seed())

    def _read_pipeline(self) -> Pipeline:
        dtypes = {"transformer": torch.float32 if self.full else self.dtype, "vae": self.vae_dtype, "default": self.dtype}
        where, text = str(self.folder or self.pretrained), self.max_sequence_length > 0
        return read_pipeline(self.pipeline, where, policies=POLICIES, dtypes=dtypes, text=text, **self.source)

    # ------------------------------------------------------------------ geometry
    @classmethod
    def _cell_of_folder(cls, folder: Path) -> int:
        return vae_factor(component_config(folder, "vae")) * cls.tokens_side(whole_numbers(component_config(folder, "transformer")))

    @property
    def vae_factor(self) -> int:
        """Pixels per latent cell."""
        return vae_factor(self._pipe.vae.config)

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width in latent cells."""
        return self.resolution[0] // self.vae_factor, self.resolution[1] // self.vae_factor

    def latent_shape(self) -> tuple[int, ...]:
        """The shape of one packed latent at the configured resolution."""
        channels = self._pipe.vae.config.latent_channels
        return tuple(self.pack(torch.empty(1, channels, *self.latent_size, device="meta")).shape[1:])

    def condition_shapes(self, before: int = 0) -> dict[str, tuple[int, ...]]:
        """Shape of one row of each entry of `condition`, told by configs. before: tokens of a prompt before T5's."""
        sizes, tokens = self._pipe.transformer.config, before + self.max_sequence_length
        shapes = {"prompt_embeds": (tokens, sizes.joint_attention_dim), "pooled": (sizes.pooled_projection_dim,)}
        return shapes | ({f"negative_{name}": shape for name, shape in shapes.items()} if self.guided else {})

    def scheduler_sigmas(self, num_steps: int, **given: object) -> Tensor:
        """The sigmas of the pipeline's own scheduler, its resolution-dependent shift included. given: for `set_timesteps`."""
        scheduler = type(self._pipe.scheduler).from_config(self._pipe.scheduler.config)
        config = scheduler.config
        if config.use_dynamic_shifting:
            height, width = self.latent_size
            given["mu"] = flux_mu(
                height * width // self.tokens_side(self._pipe.transformer.config) ** 2,
                base_shift=config.base_shift,
                max_shift=config.max_shift,
                base_len=config.base_image_seq_len,
                max_len=config.max_image_seq_len,
            )
        scheduler.set_timesteps(num_steps, **given)
        return scheduler.sigmas.double()

    # ------------------------------------------------------------------ networks
    def compute_dtype(self, *tensors: Tensor) -> list[Tensor]:
        """The inputs in the network's own precision, or as they are where autocast chooses."""
        if torch.is_autocast_enabled(tensors[0].device.type):
            return list(tensors)
        weight = self.active_network.get_submodule("context_embedder").weight
        assert isinstance(weight, Tensor)
        dtype = weight.dtype
        return [tensor.to(dtype) for tensor in tensors]

    # ------------------------------------------------------------------ text and images
    def encode(self, prompts: Sequence[str]) -> Cond:
        """Conditioning of U prompts, each encoded alone and remembered; see `FrozenParts.encode`."""
        return self.frozen.encode(prompts, self.encode_one, device=self.device, negative="" if self.guided else None)

    @property
    def guided(self) -> bool:
        """`velocity` asks for the empty prompt too."""
        return False

    def decode(self, x: Tensor) -> Tensor:
        """Clean latents Float "B *D" -> images uint8 "B 3 H W" by the VAE; sets `finite_pixels`."""
        images, self.finite_pixels = self.frozen.images(self.unpack(x.float()), device=self.device)
        return images

    def encode_images(self, images: Tensor, info: Sequence[Info] = ()) -> Tensor:
        """Clean latents of images, packed; the mode of the VAE's posterior."""
        return self.pack(self.frozen.latents(images.to(self.device).float() / 255 * 2 - 1))

    # ------------------------------------------------------------------ saving
    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """A LoRA folder that `load_lora_weights` reads, or the whole pipeline."""
        named = {name.removeprefix("network."): tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
        if self.lora:
            save_adapter(self.network, folder, named, pipeline=type(self._pipe), base=base_name(self.folder or self.pretrained))
        else:
            self._save_pipeline(folder, named)

    def _save_pipeline(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """The whole pipeline around a transformer without storage of its own, so that the live one is neither read nor written."""
        with torch.device("meta"):
            transformer = self._network_class.from_config(self._pipe.transformer.config)
        buffers = {name: buffer.detach().cpu() for name, buffer in self.network.named_buffers()}
        stored = transformer.state_dict().keys()
        transformer.load_state_dict({**weights, **{k: v for k, v in buffers.items() if k in stored}}, assign=True)
        type(self._pipe)(**{**self._pipe.components, "transformer": transformer}).save_pretrained(folder)
