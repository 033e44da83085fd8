"""FLUX.1-dev and FLUX.1-schnell (Black Forest Labs 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from lit_rl.policies.diffusers_flow import DiffusersFlowPolicy
from lit_rl.types import Cond


class FluxPolicy(DiffusersFlowPolicy):
    """One forward per velocity: the guidance scale is an input of FLUX.1-dev; schnell has no such input and ignores it.

    Latents are packed, "B L 4C": L = (height / 16) (width / 16) tokens of 2 x 2 latent cells. Args as in `DiffusersFlowPolicy`.
    """

    pipeline: ClassVar[str] = "FluxPipeline"
    lora_targets: ClassVar[list[str]] = [
        "attn.to_k",
        "attn.to_q",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_k_proj",
        "attn.add_q_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
        "ff_context.net.2",
    ]

    def __init__(self, pretrained: str, *, guidance_scale: float = 3.5, max_sequence_length: int = 512, **kwargs: Any) -> None:
        super().__init__(pretrained, guidance_scale=guidance_scale, max_sequence_length=max_sequence_length, **kwargs)

    @staticmethod
    def tokens_side(transformer: Mapping[str, int]) -> int:
        """2: a token is 2 x 2 latent cells."""
        return 2

    def blocks(self, network: nn.Module) -> Sequence[nn.Module]:
        """Double blocks, then single ones."""
        return [*network.transformer_blocks, *network.single_transformer_blocks]

    def encode_one(self, prompt: str) -> Cond:
        """T5's embeddings and CLIP's pooled one."""
        embeds, pooled, _ = self._pipe.encode_prompt(prompt=prompt, device=self.device, max_sequence_length=self.max_sequence_length)
        return {"prompt_embeds": embeds, "pooled": pooled}

    def tokens(self, x: Tensor, cond: Cond) -> Tensor:
        """The image tokens of the network for noisy latents."""
        return x

    def attention_inputs(self, cond: Cond) -> dict[str, Tensor] | None:
        """`joint_attention_kwargs` of the network."""
        return None

    def velocity(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """One forward; guidance is an input where the network takes it."""
        network = self.active_network
        image, embeds, pooled = self.compute_dtype(self.tokens(x, cond), cond["prompt_embeds"], cond["pooled"])
        guidance = (
            t.new_full((len(x),), self.guidance_scale, dtype=torch.float32) if self._pipe.transformer.config.guidance_embeds else None
        )
        return network(
            hidden_states=image,
            timestep=t.float(),  # the network multiplies by 1000 itself
            guidance=guidance,
            pooled_projections=pooled,
            encoder_hidden_states=embeds,
            txt_ids=embeds.new_zeros(embeds.shape[1], 3),
            img_ids=self._image_ids(embeds),
            joint_attention_kwargs=self.attention_inputs(cond),
            return_dict=False,
        )[0].float()

    def _image_ids(self, like: Tensor) -> Tensor:
        """(0, row, column) of each token."""
        height, width = (side // 2 for side in self.latent_size)
        axes = (torch.arange(side, device=like.device, dtype=like.dtype) for side in (1, height, width))
        return torch.cartesian_prod(*axes)

    def sigmas(self, num_steps: int) -> Tensor:
        """The pipeline's schedule, shifted by the number of tokens where its scheduler is."""
        return self.scheduler_sigmas(num_steps, sigmas=np.linspace(1.0, 1 / num_steps, num_steps))

    def pack(self, z: Tensor) -> Tensor:
        """ "B C h w" -> "B L 4C", 2 x 2 cells to a token."""
        batch, channels, height, width = z.shape
        cells = z.view(batch, channels, height // 2, 2, width // 2, 2)
        return cells.permute(0, 2, 4, 1, 3, 5).reshape(batch, height * width // 4, 4 * channels)

    def unpack(self, x: Tensor) -> Tensor:
        """ "B L 4C" -> "B C h w"."""
        height, width = self.latent_size
        cells = x.view(len(x), height // 2, width // 2, -1, 2, 2)
        return cells.permute(0, 3, 1, 4, 2, 5).reshape(len(x), -1, height, width)
