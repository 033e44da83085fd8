"""A vision-language model as judge: it writes down its thoughts and a mark from 1 to 5."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lit_rl.rewards.base import Reward
from lit_rl.types import Info

RUBRIC = """Judge the aesthetic quality of this image on a scale of five levels:
1 (Bad): broken or very unpleasant; heavy artefacts, no recognisable composition.
2 (Poor): clear flaws in composition, colour, light or sharpness dominate the impression.
3 (Fair): acceptable and ordinary; some flaws, nothing that stands out.
4 (Good): pleasant; well composed, coherent in colour and light, only small flaws.
5 (Excellent): outstanding; striking composition and light, flawless details.
First explain what you see in one or two sentences, then give one whole number. Answer in exactly this form:
<Thought>your explanation</Thought><Score>X</Score>"""
"""The default task. `{prompt}` in a rubric of your own is replaced by the image's prompt."""

_IMAGE = "<|image_pad|>"
_CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|>{images}<|vision_end|>{task}<|im_end|>\n<|im_start|>assistant\n"
)
_SCORE = re.compile(r"<\s*score\s*>\W*(\d+(?:\.\d+)?)\W*<\s*/\s*score\s*>", re.IGNORECASE)


def parse_score(answer: str) -> float:
    """X / 5 of the last `<Score>X</Score>` after the thoughts, X in 1..5, so 0.2 to 1. NaN, never 0, when the answer has none.

    What is written inside `<Thought>` does not count; an open `<Thought>` (the answer was cut off) counts as no score.
    """
    answer = re.sub(r"<\s*thought\s*>.*?(<\s*/\s*thought\s*>|$)", "", answer, flags=re.IGNORECASE | re.DOTALL)
    found = _SCORE.findall(answer)
    mark = float(found[-1]) if found else math.nan
    return mark / 5 if 1 <= mark <= 5 else math.nan


class VLMReward(Reward):
    """`vlm_score` in {0.2, ..., 1}: the mark of a Qwen2-VL / Qwen2.5-VL model / 5, decoded greedily; NaN when the answer holds no mark.

    Args:
        model_path: folder (or hub id) of the model in transformers format.
        rubric: the task; may hold `{prompt}`.
        max_new_tokens: length of the answer, thoughts included.
        dtype: `auto` takes the checkpoint's own.
        batch_size: images per call of `generate`. In bfloat16 a near-tie between two words may fall differently in another batch.
    """

    outputs = ("vlm_score",)
    highest = MappingProxyType({"vlm_score": 1.0})

    def __init__(
        self,
        model_path: str,
        *,
        rubric: str = RUBRIC,
        max_new_tokens: int = 512,
        dtype: str = "auto",
        batch_size: int = 8,
    ) -> None:
        self.model_path = model_path
        self.rubric = rubric
        self.max_new_tokens = max_new_tokens
        self.dtype = dtype
        self.batch_size = batch_size
        self._model: Any = None

    def setup(self, *, rank: int = 0, world_size: int = 1, device: str = "cpu") -> None:
        """Read the weights. Raises OSError when `model_path` holds no model, ValueError when it is not a Qwen-VL one."""
        from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

        if self._model is None:
            self._tokenizer = AutoTokenizer.from_pretrained(self.model_path, padding_side="left")
            self._processor = AutoImageProcessor.from_pretrained(self.model_path, backend="pil")
            self._image_token = self._tokenizer.convert_tokens_to_ids(_IMAGE)
            if self._image_token in (None, self._tokenizer.unk_token_id) or not hasattr(self._processor, "merge_size"):
                raise ValueError(f"{self.model_path} has no {_IMAGE} token; VLMReward speaks the chat format of Qwen2-VL and Qwen2.5-VL")
            model = AutoModelForImageTextToText.from_pretrained(self.model_path, dtype=self.dtype)
            self._model = model.eval().requires_grad_(False)
        self._model.to(device)

    def score(self, media: Tensor, info: Sequence[Info]) -> Mapping[str, Tensor]:
        """The model's score of each image, NaN where its text has none."""
        return self.explain(media, info)[0]

    def explain(self, media: Tensor, info: Sequence[Info]) -> tuple[Mapping[str, Tensor], Mapping[str, Sequence[str]]]:
        """The scores, and the model's texts."""
        if self._model is None:
            self.setup()
        answers: list[str] = []
        for i in range(0, len(media), self.batch_size):
            answers += self.answer(media[i : i + self.batch_size], [str(row["prompt"]) for row in info[i : i + self.batch_size]])
        return {"vlm_score": torch.tensor([parse_score(a) for a in answers])}, {"vlm_answer": answers}

    @torch.no_grad()
    def answer(self, media: Tensor, prompts: Sequence[str]) -> list[str]:
        """The model's text about each image."""
        device = self._model.device
        images = [image.numpy() for image in media.permute(0, 2, 3, 1).cpu()]
        pixels = self._processor(images, return_tensors="pt", input_data_format="channels_last")
        counts = (pixels["image_grid_thw"].prod(-1) // self._processor.merge_size**2).tolist()
        chats = [_CHAT.replace("{images}", _IMAGE * n).replace("{task}", self._task(p)) for n, p in zip(counts, prompts, strict=True)]
        tokens = self._tokenizer(chats, padding=True, return_tensors="pt").to(device)
        written = self._model.generate(
            **{k: tokens[k] for k in ("input_ids", "attention_mask")},
            mm_token_type_ids=(tokens["input_ids"] == self._image_token).int(),
            pixel_values=pixels["pixel_values"].to(device, self._model.dtype),
            image_grid_thw=pixels["image_grid_thw"].to(device),
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
        )
        return self._tokenizer.batch_decode(written[:, tokens["input_ids"].shape[1] :], skip_special_tokens=True)

    def _task(self, prompt: str) -> str:
        """The rubric; a prompt put into it cannot forge chat markup (`<|im_end|>` is one token to the tokenizer)."""
        return self.rubric.replace("{prompt}", prompt.replace("<|", "< |"))
