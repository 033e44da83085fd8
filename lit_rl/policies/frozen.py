"""The parts of a diffusers pipeline that no method trains: text encoders and VAE. They are read, moved to the device, asked, moved back."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lit_rl.errors import ConfigError
from lit_rl.losses.masked import finite_rows
from lit_rl.policies.pretrained import Pipeline, check_index, without_bars
from lit_rl.policies.unread import leaves_weights, parts_of
from lit_rl.types import Cond

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "conditioner")


def read_pipeline(
    name: str, where: str, *, policies: Mapping[str, str], dtypes: Mapping[str, torch.dtype], text: bool, **source: str | None
) -> Pipeline:
    """A pipeline of the diffusers class `name`, frozen, on the CPU; components that its index leaves out are None.

    policies: See `check_pretrained`. dtypes: By component, and "default". text: Whether prompts have tokens for a T5 encoder.
    """
    import diffusers

    import lit_rl.miniatures.pixel_vae  # noqa: F401  (diffusers looks it up among the imported modules)

    pipeline = getattr(diffusers, name)
    try:
        index = pipeline.load_config(where, revision=source.get("revision"))
    except OSError as error:
        raise ConfigError(f"pretrained: {where!r} is neither a folder nor a hub repository that can be read: {error}") from error
    check_index(index, where, pipeline=name, policies=policies)
    parts = {part: entry for part, entry in index.items() if isinstance(entry, list | tuple)}
    if not text and any(entry[1] == "T5EncoderModel" for entry in parts.values()):
        raise ConfigError(f"max_sequence_length: 0 asks the T5 encoder of {where!r} for no token; set it to at least 1")
    if leaves_weights():
        return pipeline(**parts_of(index, where, dtypes=dtypes, **source))
    without_bars()
    absent = {part: None for part, entry in parts.items() if entry[0] is None}
    pipe = pipeline.from_pretrained(where, dtype=dict(dtypes), **source, **absent)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False)
    return pipe


class FrozenParts:
    """Text encoders and VAE of a pipeline, each in its own precision and without gradients.

    Args:
        pipe: The pipeline.
        offload_text_encoders: Keep the text encoders on the CPU between two calls.
        offload_vae: Likewise for the VAE.
        vae_slice: Images decoded (or encoded) at once.
        cache_prompts: Encoded prompts remembered in CPU memory, the least recently used one leaving first.
    """

    def __init__(self, pipe: Pipeline, *, offload_text_encoders: bool, offload_vae: bool, vae_slice: int, cache_prompts: int) -> None:
        self.pipe = pipe
        self.offload_text_encoders = offload_text_encoders
        self.offload_vae = offload_vae
        self.vae_slice = vae_slice
        self.cache_prompts = cache_prompts
        self._cache: OrderedDict[str, Cond] = OrderedDict()

    @contextmanager
    def on_device(self, names: Sequence[str], device: torch.device, *, offload: bool) -> Iterator[None]:
        """Inside it these parts of the pipeline are on `device`, and neither autograd nor autocast is active."""
        parts = [part for name in names if (part := getattr(self.pipe, name, None)) is not None]
        homes = [(parameter, parameter.data) for part in parts for parameter in part.parameters()] if offload else []
        for part in parts:
            part.to(device)
        try:
            with torch.no_grad(), torch.autocast(device.type, enabled=False):
                yield
        finally:
            if offload:
                for parameter, home in homes:
                    parameter.data = home  # nothing has changed it, so nothing is copied back
                for part in parts:
                    part.to("cpu")

    def encode(
        self, prompts: Sequence[str], encode_one: Callable[[str], Cond], *, device: torch.device, negative: str | None = None
    ) -> Cond:
        """U prompts -> conditioning with U rows, and one row "negative_..." where there is a negative prompt.

        One prompt at a time: the result depends on nothing else in the batch, so a cache hit equals a miss. Where prompts have different
        lengths, 0 fills them up behind.
        """
        wanted = dict.fromkeys(prompts if negative is None else (*prompts, negative))
        missing = [text for text in wanted if text not in self._cache]
        if missing:
            with self.on_device(ENCODERS, device, offload=self.offload_text_encoders):
                for text in missing:
                    self._cache[text] = {key: value.cpu() for key, value in encode_one(text).items()}
        for text in wanted:
            self._cache.move_to_end(text)
        rows = {text: self._cache[text] for text in wanted}
        while len(self._cache) > self.cache_prompts:
            self._cache.popitem(last=False)
        cond = {key: rows_of([rows[text][key] for text in prompts]).to(device) for key in rows[prompts[0]]}
        empty = {} if negative is None else {f"negative_{key}": value.to(device) for key, value in rows[negative].items()}
        return cond | empty

    def latents(self, pixels: Tensor) -> Tensor:
        """Pixels Float "B 3 H W" in [-1, 1] -> scaled latents Float32 "B C h w", the mode of the VAE's posterior."""
        vae = self.pipe.vae
        with self.on_device(("vae",), pixels.device, offload=self.offload_vae):
            parts = pixels.to(vae.dtype).split(self.vae_slice)
            z = torch.cat([vae.encode(part).latent_dist.mode() for part in parts]).float()
        return (z - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor

    def images(self, z: Tensor, *, device: torch.device) -> tuple[Tensor, Tensor]:
        """Scaled latents Float32 "B C h w" -> images uint8 "B 3 H W", and Bool "B": those of finite pixels before they became uint8."""
        vae = self.pipe.vae
        z = z / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        with self.on_device(("vae",), device, offload=self.offload_vae):
            found = [self._decoded(part) for part in z.to(device).split(self.vae_slice)]
        pixels = [((image.float().nan_to_num() * 0.5 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8) for image in found]
        return torch.cat(pixels), torch.cat([finite_rows(image) for image in found])

    def _decoded(self, z: Tensor) -> Tensor:
        """Latents as the VAE has them -> its pixels; in float32 those of images that it does not get through in lower precision."""
        vae, dtype = self.pipe.vae, self.pipe.vae.dtype
        pixels = vae.decode(z.to(dtype), return_dict=False)[0]
        if dtype == torch.float32 or not (lost := finite_rows(z) & ~finite_rows(pixels)).any():
            return pixels
        nn.Module.to(vae, torch.float32)
        try:
            again = vae.decode(z[lost].float(), return_dict=False)[0]
        finally:
            nn.Module.to(vae, dtype)
        return pixels.float().index_put((lost.nonzero()[:, 0],), again)


def rows_of(parts: Sequence[Tensor]) -> Tensor:
    """Tensors "1 L ..." of different L one below the other, filled up with 0 behind."""
    longest = max(part.shape[1] for part in parts)
    return torch.cat([part if part.shape[1] == longest else filled_up(part, longest) for part in parts])


def filled_up(x: Tensor, length: int) -> Tensor:
    """Float "B L ..." -> "B length ...", 0 behind."""
    return torch.cat([x, x.new_zeros(len(x), length - x.shape[1], *x.shape[2:])], 1)
