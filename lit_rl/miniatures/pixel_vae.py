"""An exact autoencoder without weights: what the miniature pipelines carry in place of a VAE.

diffusers finds the class by the module path written into `model_index.json`, but only in modules that are already imported, so
`import lit_rl.miniatures.pixel_vae` comes before `from_pretrained` of such a folder. Importing this file imports diffusers.
"""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle


class PixelUnshuffleVAE(ModelMixin, ConfigMixin):
    """Pixels "B 3 H W" <-> latents "B C*f*f H/f W/f", f = 2^(len(block_out_channels) - 1), with AutoencoderKL's interface.

    image_channels: 3 keeps colour and is exactly invertible; 1 stores the mean of the channels, exact for grey images.
    """

    @register_to_config
    def __init__(
        self,
        image_channels: int = 3,
        latent_channels: int = 12,
        block_out_channels: tuple[int, ...] = (1, 1),
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
    ) -> None:
        super().__init__()
        self.image_channels = image_channels
        self.factor = 2 ** (len(block_out_channels) - 1)
        if latent_channels != (unshuffled := image_channels * self.factor**2):
            raise ValueError(f"latent_channels={latent_channels}: {image_channels} channels unshuffled by {self.factor} make {unshuffled}")
        self.register_buffer("anchor", torch.zeros(1))  # a tensor for the dtype, the device and the weights file to hang on

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Pixels to latents, without loss."""
        pixels = x if self.image_channels == 3 else x.mean(dim=1, keepdim=True)
        mean = pixel_unshuffle(pixels, self.factor)
        posterior = DiagonalGaussianDistribution(torch.cat([mean, torch.zeros_like(mean)], dim=1), deterministic=True)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None) -> DecoderOutput | tuple[Tensor]:
        """Latents to pixels, without loss."""
        pixels = pixel_shuffle(z, self.factor).expand(-1, 3, -1, -1)
        return DecoderOutput(sample=pixels) if return_dict else (pixels,)
