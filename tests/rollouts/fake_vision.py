"""The server of the tests over a vision-language miniature: images on the routes of vLLM and SGLang."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from aiohttp import web
from PIL import Image
from rollouts.fake_server import FakeServer
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil


class FakeVision(FakeServer):
    """Images are read by transformers' own processor, with the settings of `processor`; all places of one are told as SGLang and vLLM do.

    blind: Adapters of the vision tower are left out in silence, as vLLM does without --enable-tower-connector-lora.
    """

    blind = False

    def load_model(self, folder: Path | str) -> None:
        self.model: Any = AutoModelForImageTextToText.from_pretrained(folder).eval()
        self.processor = Qwen2VLImageProcessorPil.from_pretrained(self.folder)
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.seen: dict[str, torch.Tensor] = {}

    def add_adapter(self, name: str, folder: str) -> None:
        super().add_adapter(name, folder)
        for part, parameter in self.model.named_parameters():
            if self.blind and ".visual." in part and f"lora_B.{name}." in part:
                parameter.data.zero_()

    def prompt_with(self, ids: list[int], urls: Sequence[str]) -> list[int]:
        """The prompt with all places of its images, which the next forwards see."""
        self.seen, counts = {}, iter(())
        if urls:
            images = [Image.open(BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]
            self.seen = dict(self.processor(images=images, return_tensors="pt"))
            counts = iter((self.seen["image_grid_thw"].prod(-1) // self.processor.merge_size**2).tolist())
        place = self.model.config.image_token_id
        return [i for token in ids for i in [token] * (next(counts) if token == place else 1)]

    def logits(self, ids: list[int]) -> torch.Tensor:
        whole = torch.tensor([ids])
        kinds = (whole == self.model.config.image_token_id).int()
        with torch.no_grad():
            return self.model(input_ids=whole, mm_token_type_ids=kinds, **self.seen).logits[0].float()

    # ------------------------------------------------------------------ /v1/chat/completions
    def routes(self) -> list[web.RouteDef]:
        return [web.post("/v1/chat/completions", self._guarded(self._chat)), *super().routes()]

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        parts = [part for turn in body["messages"] if isinstance(turn["content"], list) for part in turn["content"]]
        urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        how = {name: body[name] for name in ("add_generation_prompt", "continue_final_message")} | body.get("chat_template_kwargs", {})
        ids = self.tokenizer.apply_chat_template(body["messages"], tokenize=True, return_dict=False, tools=body.get("tools"), **how)
        prompt = self.prompt_with(ids, urls)
        whole = {"object": "chat.completion", "model": self._chosen(body["model"])}
        whole |= {"prompt_token_ids": prompt if body["return_token_ids"] else None, "prompt_logprobs": None}
        choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": "not looked at"}, "finish_reason": "length"}
        if "prompt_logprobs" in body:
            return web.json_response(whole | {"choices": [choice], "prompt_logprobs": self._prompt_logprobs(prompt)})

        def say(ids: list[int], logprobs: list[float], finish: str) -> Any:
            rows = [{"token": f"token_id:{i}", "logprob": value, "top_logprobs": []} for i, value in zip(ids, logprobs)]
            return whole | {"choices": [choice | {"token_ids": ids, "logprobs": {"content": rows}, "finish_reason": finish}]}

        assert body["logprobs"] is True and body["top_logprobs"] == 0 and body["return_tokens_as_token_ids"] and body["ignore_eos"]
        return await self.answer(request, body, prompt, body, body["max_tokens"], body["seed"], say)
