"""Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv 2403.03206)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from lit_rl.errors import ConfigError
from lit_rl.policies.diffusers_flow import DiffusersFlowPolicy
from lit_rl.types import Cond, Info


class SD3Policy(DiffusersFlowPolicy):
    """v = n + s (p - n): prompt and empty prompt in one forward, differentiable through both.

    s is guidance_scale; at s <= 1 the prompt alone answers, as in the pipeline. Args as in `DiffusersFlowPolicy`.
    """

    pipeline: ClassVar[str] = "StableDiffusion3Pipeline"
    lora_targets: ClassVar[list[str]] = [
        "attn.add_k_proj",
        "attn.add_q_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "attn.to_k",
        "attn.to_out.0",
        "attn.to_q",
        "attn.to_v",
    ]

    any_size = True

    @staticmethod
    def tokens_side(transformer: Mapping[str, int]) -> int:
        """The transformer's patch size."""
        return transformer["patch_size"]

    @property
    def guided(self) -> bool:
        """The guidance scale is above 1."""
        return self.guidance_scale > 1

    def condition_shapes(self, before: int = 0) -> dict[str, tuple[int, ...]]:
        """The shapes with CLIP's tokens before those of T5."""
        return super().condition_shapes(before + self._pipe.text_encoder.config.max_position_embeddings)

    def blocks(self, network: nn.Module) -> Sequence[nn.Module]:
        """The transformer blocks."""
        return list(network.get_submodule("transformer_blocks").children())

    def encode_one(self, prompt: str) -> Cond:
        """Embeddings of all text encoders side by side, and CLIP's pooled ones."""
        embeds, _, pooled, _ = self._pipe.encode_prompt(
            prompt=prompt,
            prompt_2=None,
            prompt_3=None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return {"prompt_embeds": embeds, "pooled": pooled}

    def encode_images(self, images: Tensor, info: Sequence[Info] = ()) -> Tensor:
        """Clean latents of images. Raises ConfigError for images beyond the transformer's table of positions."""
        sizes = self._pipe.transformer.config
        most = sizes.pos_embed_max_size * sizes.patch_size * self._pipe.vae_scale_factor
        height, width = images.shape[-2:]
        if max(height, width) > most:
            prompts = ", ".join(repr(row["prompt"]) for row in info)
            raise ConfigError(
                f"an image of {width} x {height} pixels of {prompts} is beyond the {most} pixels for which the transformer has positions: "
                "leave it out, or give its source a smaller size"
            )
        return super().encode_images(images, info)

    def velocity(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """One forward of prompt and empty prompt together where guidance is on."""
        embeds, pooled, real = self.text(cond)
        if self.guided:
            x, t = torch.cat([x, x]), torch.cat([t, t])
        x, embeds, pooled = self.compute_dtype(x, embeds, pooled)
        v = self.active_network(
            hidden_states=x, timestep=t.float() * 1000, encoder_hidden_states=embeds, pooled_projections=pooled,
            joint_attention_kwargs=None if real is None else {"attention_mask": real}, return_dict=False,
        )[0].float()  # fmt: skip
        if self.guided:
            negative, positive = v.chunk(2)
            v = negative + self.guidance_scale * (positive - negative)
        return v

    def text(self, cond: Cond) -> tuple[Tensor, Tensor, Tensor | None]:
        """Embeddings, pooled ones and Bool mask of the real tokens (None: all are), the empty prompt's rows first where guidance is on."""
        embeds, pooled = cond["prompt_embeds"], cond["pooled"]
        if self.guided:
            embeds = torch.cat([cond["negative_prompt_embeds"].expand_as(embeds), embeds])
            pooled = torch.cat([cond["negative_pooled"].expand_as(pooled), pooled])
        return embeds, pooled, None

    def sigmas(self, num_steps: int) -> Tensor:
        """The pipeline's schedule with its fixed shift."""
        return self.scheduler_sigmas(num_steps)

    def pack(self, z: Tensor) -> Tensor:
        """Latents as they are."""
        return z

    def unpack(self, x: Tensor) -> Tensor:
        """Latents as they are."""
        return x
