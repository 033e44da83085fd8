"""Likeness of image and prompt: the cosine of their CLIP embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_rl.errors import ConfigError
from lit_rl.rewards.base import Reward
from lit_rl.types import Info


class CLIPScoreReward(Reward):
    """`clip_score` = exp(logit_scale) * cos(image, prompt) / 30, roughly 0.5-1.2 (Flow-GRPO's scaling of CLIPScore, arXiv 2104.08718).

    Args:
        model_path: folder (or hub id) of a CLIP model in transformers format.
        processor_path: where tokenizer and image processor are, when the model's folder lacks them.
        dtype: of the weights, e.g. `float32`, `bfloat16`.
        batch_size: images per forward.
    """

    outputs = ("clip_score",)
    divisor = 30.0

    def __init__(self, model_path: str, *, processor_path: str | None = None, dtype: str = "float32", batch_size: int = 32) -> None:
        self.model_path = model_path
        self.processor_path = processor_path or model_path
        self.dtype = getattr(torch, dtype)
        self.batch_size = batch_size
        self._model: Any = None

    def setup(self, *, rank: int = 0, world_size: int = 1, device: str = "cpu") -> None:
        """Read the weights. Raises OSError when `model_path` holds no CLIP model."""
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        if self._model is None:
            self._model = CLIPModel.from_pretrained(self.model_path, dtype=self.dtype).eval().requires_grad_(False)
            self._tokenizer = AutoTokenizer.from_pretrained(self.processor_path)
            self._processor = AutoImageProcessor.from_pretrained(self.processor_path, backend="pil")
        self._model.to(device)

    @torch.no_grad()
    def score(self, media: Tensor, info: Sequence[Info]) -> Mapping[str, Tensor]:
        """exp(logit_scale) cos(image, prompt) / divisor of each image."""
        self.setup(device=str(self._model.device) if self._model is not None else "cpu")
        parts = [
            self._similarity(media[i : i + self.batch_size], [str(row["prompt"]) for row in info[i : i + self.batch_size]])
            for i in range(0, len(media), self.batch_size)
        ]
        return {self.outputs[0]: torch.cat(parts) * self.factor() / self.divisor}

    def factor(self) -> float:
        """exp(logit_scale)."""
        return float(self._model.logit_scale.float().exp())

    def _similarity(self, media: Tensor, prompts: Sequence[str]) -> Tensor:
        """The cosine of each image with its own prompt, Float "B". Prompts are cut at the model's context length (77)."""
        device, images = self._model.device, [image.numpy() for image in media.permute(0, 2, 3, 1).cpu()]
        pixels = self._processor(images, return_tensors="pt", input_data_format="channels_last")["pixel_values"].to(device, self.dtype)
        length = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(list(prompts), padding=True, truncation=True, max_length=length, return_tensors="pt").to(device)
        out = self._model(pixel_values=pixels, input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return (out.image_embeds.float() * out.text_embeds.float()).sum(-1).cpu()


class PickScoreReward(CLIPScoreReward):
    """`pick_score` = exp(logit_scale) * cos(image, prompt) / 26, roughly 0.7-0.95 (PickScore, arXiv 2305.01569; divided as in Flow-GRPO).

    `yuvalkirstain/PickScore_v1` brings no processor: give `processor_path="laion/CLIP-ViT-H-14-laion2B-s32B-b79K"`.
    """

    outputs = ("pick_score",)
    divisor = 26.0


class CLIPSimilarity(CLIPScoreReward):
    """`clip_sim` = cos(image, prompt) in [-1, 1], as DeepGen-RL takes it from CLIP ViT-L/14.

    Args:
        model_path: Folder (or hub id) of a CLIP model in transformers format; default: $CLIP_MODEL_NAME_OR_PATH.
        processor_path, dtype, batch_size: See `CLIPScoreReward`.
    """

    outputs = ("clip_sim",)
    divisor = 1.0

    def __init__(
        self, model_path: str | None = None, *, processor_path: str | None = None, dtype: str = "float32", batch_size: int = 32
    ) -> None:
        if not model_path:
            raise ConfigError("model_path: name the folder or hub id of a CLIP model, here or in $CLIP_MODEL_NAME_OR_PATH")
        super().__init__(model_path, processor_path=processor_path, dtype=dtype, batch_size=batch_size)

    def factor(self) -> float:
        """1: the cosine itself."""
        return 1.0
