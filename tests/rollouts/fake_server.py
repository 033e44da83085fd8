"""A server that speaks as vLLM and as SGLang do, over a miniature, with our own draws, and with faults."""

from __future__ import annotations

from typing import Any

from aiohttp import web
from rollouts.fake_vllm import VLLMRoutes
from rollouts.fake_weights import BASE, Handler

__all__ = ["BASE", "FakeServer"]


class FakeServer(VLLMRoutes):
    """See `Holding` for what can be set; a route that neither server has is not found."""

    def routes(self) -> list[web.RouteDef]:
        posts: dict[str, Handler] = {
            "/load_lora_adapter": self._load_lora_adapter,
            "/unload_lora_adapter": self._unload,
            "/update_weights_from_disk": self._load_weights,
            "/generate": self._generate,
        }
        health, nowhere = web.get("/health", self._health), web.route("*", "/{rest:.*}", self._nowhere)
        return [health, *self.vllm_routes(), *(web.post(r, h) for r, h in posts.items()), nowhere]

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response(status=self.health.pop(0) if self.health else 200)

    async def _nowhere(self, _: web.Request) -> web.Response:
        return web.json_response({"detail": "Not Found"}, status=404)

    async def _load_lora_adapter(self, request: web.Request) -> web.Response:
        body = await request.json()
        name = body["lora_name"]
        if name in self.adapters:
            return web.json_response({"success": False, "error_message": f"LoRA adapter {name} is already loaded"}, status=400)
        self.add_adapter(name, body["lora_path"])
        return web.json_response({"success": True, "loaded_adapters": dict.fromkeys(self.adapters, "")})

    async def _load_weights(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.loads.append(body["model_path"])
        if self.refuses_loads:
            return web.json_response({"success": False, "message": "no such layer"})
        if not self.stale:
            self.load_model(body["model_path"])
        self.weights_version = body.get("weight_version", self.weights_version)
        return web.json_response({"success": True, "message": "Succeeded to update model weights."})

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        settings, adapter = body["sampling_params"], body.get("lora_path", "")
        if adapter and adapter not in self.adapters:
            return web.json_response({"error": {"message": f"{adapter} was not loaded"}}, status=400)
        self.choose(adapter)
        prompt = self.prompt_with(body["input_ids"], body.get("image_data", ()))
        told = {"prompt_token_ids": prompt} if body.get("return_prompt_token_ids") else {}
        meta = {"weight_version": self.weights_version}
        if (start := body.get("logprob_start_len")) is not None:
            pairs = [[None, prompt[start], None], *([v, i, None] for i, v in self.score(prompt)[start:])]
            return web.json_response(told | {"meta_info": meta | {"input_token_logprobs": pairs, "finish_reason": {"type": "length"}}})

        def say(ids: list[int], logprobs: list[float], finish: str) -> Any:
            pairs = [[value, token, None] for value, token in zip(logprobs, ids)]
            return told | {"text": "not looked at", "meta_info": meta | {"output_token_logprobs": pairs, "finish_reason": {"type": finish}}}

        seed, count = settings["sampling_seed"], settings["max_new_tokens"]
        return await self.answer(request, body, prompt, settings, count, seed, say)
