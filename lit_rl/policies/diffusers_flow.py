"""What the policies around a diffusers pipeline share: loading, LoRA, reference, prompt cache, decoding, saving."""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lit_rl.errors import ConfigError
from lit_rl.losses.masked import finite_rows
from lit_rl.policies.base import FlowPolicy
from lit_rl.policies.pretrained import check_index, check_pretrained, check_resolution, component_config, vae_factor, without_bars
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
        compile: `torch.compile` each block; pays on a GPU only.
        dtype: Of the frozen weights: text encoders, and with LoRA the base network. Adapters are float32 always.
        vae_dtype: Of the VAE; float16 overflows in some.
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
        compile: bool = False,
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
        self.folder = check_pretrained(pretrained, pipeline=self.pipeline, policies=POLICIES)
        self.resolution = check_resolution(resolution, cell=self._cell_of_folder(self.folder) if self.folder else None)
        self.pretrained = pretrained
        self.guidance_scale = guidance_scale
        self.max_sequence_length = max_sequence_length
        self.gradient_checkpointing = gradient_checkpointing
        self.compile_blocks = compile
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.vae_dtype: torch.dtype = getattr(torch, vae_dtype)
        self.offload_text_encoders = offload_text_encoders
        self.offload_vae = offload_vae
        self.vae_slice = vae_slice
        self.cache_prompts = cache_prompts
        self.source = {"revision": revision, "variant": variant}
        self._encoded: OrderedDict[str, Cond] = OrderedDict()

    # ------------------------------------------------------------------ what a family says
    @staticmethod
    @abstractmethod
    def tokens_side(transformer: dict[str, Any]) -> int:
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
        self._pipe: Any = pipe  # no nn.Module, so that nobody shards, moves or saves what is frozen in it
        check_resolution(self.resolution, cell=self.vae_factor * self.tokens_side(pipe.transformer.config))
        self._network_class = type(pipe.transformer)
        self.set_network(pipe.transformer, add=self._add_adapter, dtype=self.dtype)
        for network in self.networks():
            if self.gradient_checkpointing:
                network.enable_gradient_checkpointing()  # type: ignore[operator]
            if self.compile_blocks:
                for block in self.blocks(network):
                    block.compile()

    def _add_adapter(self, lora: LoraSettings) -> None:
        if lora.initial:
            load_initial(self._pipe, lora)
        else:
            add_lora(self.network, lora, targets=lora.named or self.lora_targets, seed=torch.initial_seed())

    def _read_pipeline(self) -> Any:
        import diffusers

        import lit_rl.miniatures.pixel_vae  # noqa: F401  (diffusers looks it up among the imported modules)

        pipeline = getattr(diffusers, self.pipeline)
        where = str(self.folder or self.pretrained)
        try:
            index = pipeline.load_config(where, revision=self.source["revision"])
        except OSError as error:
            raise ConfigError(f"pretrained: {where!r} is neither a folder nor a hub repository that can be read: {error}") from error
        check_index(index, where, pipeline=self.pipeline, policies=POLICIES)
        if self.max_sequence_length == 0 and any(part[1] == "T5EncoderModel" for part in index.values() if isinstance(part, list | tuple)):
            raise ConfigError(f"max_sequence_length: 0 asks the T5 encoder of {where!r} for no token; set it to at least 1")
        absent = {name: None for name, part in index.items() if isinstance(part, list | tuple) and part[0] is None}
        network_dtype = torch.float32 if self.full else self.dtype
        dtypes = {"transformer": network_dtype, "vae": self.vae_dtype, "default": self.dtype}
        without_bars()
        pipe = pipeline.from_pretrained(where, dtype=dtypes, **self.source, **absent)
        for part in pipe.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False)
        return pipe

    # ------------------------------------------------------------------ geometry
    @classmethod
    def _cell_of_folder(cls, folder: Path) -> int:
        return vae_factor(component_config(folder, "vae")) * cls.tokens_side(component_config(folder, "transformer"))

    @property
    def vae_factor(self) -> int:
        return vae_factor(self._pipe.vae.config)

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width in latent cells."""
        return self.resolution[0] // self.vae_factor, self.resolution[1] // self.vae_factor

    def latent_shape(self) -> tuple[int, ...]:
        channels = self._pipe.vae.config.latent_channels
        return tuple(self.pack(torch.empty(1, channels, *self.latent_size, device="meta")).shape[1:])

    def scheduler_sigmas(self, num_steps: int, **given: Any) -> Tensor:
        """What the pipeline's own scheduler steps through, its resolution-dependent shift included. given: for `set_timesteps`."""
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
        if torch.is_autocast_enabled(self.device.type):
            return list(tensors)
        network: Any = self.active_network
        dtype = network.context_embedder.weight.dtype
        return [tensor.to(dtype) for tensor in tensors]

    # ------------------------------------------------------------------ frozen parts
    @contextmanager
    def _awake(self, names: Sequence[str], *, offload: bool) -> Iterator[None]:
        """Inside it these parts of the pipeline are on `self.device`, in their own precision and without gradients."""
        parts = [part for name in names if (part := getattr(self._pipe, name, None)) is not None]
        homes = [(parameter, parameter.data) for part in parts for parameter in part.parameters()] if offload else []
        for part in parts:
            part.to(self.device)
        try:
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                yield
        finally:
            if offload:
                for parameter, home in homes:
                    parameter.data = home  # nothing has changed it, so nothing is copied back
                for part in parts:
                    part.to("cpu")

    def encode(self, prompts: Sequence[str]) -> Cond:
        """See the base class. One prompt at a time: the result depends on nothing else in the batch, so a cache hit equals a miss."""
        guided = ("",) if self.guided else ()
        wanted = dict.fromkeys((*prompts, *guided))
        missing = [text for text in wanted if text not in self._encoded]
        if missing:
            with self._awake(("text_encoder", "text_encoder_2", "text_encoder_3"), offload=self.offload_text_encoders):
                for text in missing:
                    self._encoded[text] = {key: value.cpu() for key, value in self.encode_one(text).items()}
        for text in wanted:
            self._encoded.move_to_end(text)
        rows = {text: self._encoded[text] for text in wanted}
        while len(self._encoded) > self.cache_prompts:
            self._encoded.popitem(last=False)
        cond = {key: torch.cat([rows[text][key] for text in prompts]).to(self.device) for key in rows[prompts[0]]}
        return cond | {f"negative_{key}": value.to(self.device) for text in guided for key, value in rows[text].items()}

    @property
    def guided(self) -> bool:
        """Whether `velocity` also asks for the empty prompt."""
        return False

    def decode(self, x: Tensor) -> Tensor:
        config = self._pipe.vae.config
        z = self.unpack(x.float()) / config.scaling_factor + (config.shift_factor or 0.0)
        with self._awake(("vae",), offload=self.offload_vae):
            images = [self._pipe.vae.decode(part, return_dict=False)[0] for part in z.to(self.device, self.vae_dtype).split(self.vae_slice)]
        self.finite_pixels = torch.cat([finite_rows(image) for image in images])
        return torch.cat([((image.float().nan_to_num() * 0.5 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8) for image in images])

    def encode_images(self, images: Tensor, info: Sequence[Info] = ()) -> Tensor:
        config = self._pipe.vae.config
        pixels = (images.to(self.device).float() / 255 * 2 - 1).to(self.vae_dtype)
        with self._awake(("vae",), offload=self.offload_vae):
            z = torch.cat([self._pipe.vae.encode(part).latent_dist.mode() for part in pixels.split(self.vae_slice)])
        return self.pack((z.float() - (config.shift_factor or 0.0)) * config.scaling_factor)

    # ------------------------------------------------------------------ saving
    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
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
