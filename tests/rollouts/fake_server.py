"""A server that speaks as vLLM and as SGLang do, over a miniature, with our own draws, and with faults."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from aiohttp import web
from peft import PeftModel
from rewards.fault_proxy import Fault, LocalServer
from transformers import AutoModelForCausalLM

from lit_rl.samplers.tokens import draw_tokens

BASE = "miniature"
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def _error(status: int, message: str, kind: str, param: str | None = None) -> web.Response:
    return web.json_response({"error": {"message": message, "type": kind, "param": param, "code": status}}, status=status)


class FakeServer(LocalServer):
    """Each question for an answer takes the next of `faults`: those of `Fault`'s kinds status, drop, hang, slow, garbage, and abort, nan.

    stale: Says that it took the weights and did not. raw: Log-probabilities at temperature 1, as vLLM's default has them. backwards: The
    first of `backwards` questions is answered last.
    """

    def __init__(self, folder: Path, faults: Iterable[Fault] = (), *, raw: bool = False, backwards: int = 0, token: str = "") -> None:
        super().__init__()
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.faults, self.raw, self.backwards, self.token = iter(faults), raw, backwards, token
        self.stale = False
        self.weights_version = "default"
        self.adapters: list[str] = []
        self.bases = [BASE]  # names of the base model: answers say the first, whichever was asked for
        self.folder, self.resets = folder, 0
        self.restarts_before = 0  # the question before which it is restarted
        self.max_model_len: int | None = None
        self.loads: list[str] = []  # names or folders, in order
        self.asked: list[Mapping[str, Any]] = []  # bodies of questions for answers
        self.health: list[int] = []  # statuses before 200
        self.refuses_loads = False

    def routes(self) -> list[web.RouteDef]:
        posts: dict[str, Handler] = {
            "/v1/completions": self._completions,
            "/v1/load_lora_adapter": self._load_adapter,
            "/load_lora_adapter": self._load_adapter,
            "/v1/unload_lora_adapter": self._unload_adapter,
            "/unload_lora_adapter": self._unload_adapter,
            "/collective_rpc": self._reload_weights,
            "/reset_prefix_cache": self._reset_prefix_cache,
            "/update_weight_version": self._name_weights,
            "/update_weights_from_disk": self._load_weights,
            "/generate": self._generate,
        }
        return [
            web.get("/health", self._health),
            web.get("/v1/models", self._models),
            web.get("/weight_info", self._info),
            *(web.post(r, h) for r, h in posts.items()),
        ]

    # ------------------------------------------------------------------ what it holds
    async def _health(self, _: web.Request) -> web.Response:
        return web.Response(status=self.health.pop(0) if self.health else 200)

    async def _models(self, request: web.Request) -> web.Response:
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        told = {} if self.max_model_len is None else {"max_model_len": self.max_model_len}
        bases = [{"id": name, "parent": None} | told for name in self.bases]
        return web.json_response({"data": [*bases, *({"id": name, "parent": self.bases[0]} for name in self.adapters)]})

    async def _load_adapter(self, request: web.Request) -> web.Response:
        body = await request.json()
        name, folder = body["lora_name"], body["lora_path"]
        if self.refuses_loads:
            return web.json_response({"detail": "Not Found"}, status=404)
        if name in self.adapters:
            return _error(400, f"The lora adapter '{name}' has already been loaded.", "InvalidUserInput")
        self.loads.append(name)
        if not Path(folder).is_dir():
            return _error(404, f"No adapter found for {folder}", "NotFoundError")
        if self.stale and self.adapters:
            folder = self.last
        self.last = folder
        if isinstance(self.model, PeftModel):
            self.model.load_adapter(folder, adapter_name=name)
        else:
            self.model = PeftModel.from_pretrained(self.model, folder, adapter_name=name).eval()
        self.adapters.append(name)
        return web.Response(text=f"Success: LoRA adapter '{name}' added successfully.")

    async def _unload_adapter(self, request: web.Request) -> web.Response:
        name = (await request.json())["lora_name"]
        if name not in self.adapters:
            return _error(404, f"The lora adapter '{name}' cannot be found.", "NotFoundError")
        self.adapters.remove(name)
        self.model.delete_adapter(name)
        return web.Response(text=f"Success: LoRA adapter '{name}' removed successfully.")

    async def _load_weights(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.loads.append(body["model_path"])
        if self.refuses_loads:
            return web.json_response({"success": False, "message": "no such layer"})
        if not self.stale:
            self.model = AutoModelForCausalLM.from_pretrained(body["model_path"]).eval()
        self.weights_version = body.get("weight_version", self.weights_version)
        return web.json_response({"success": True, "message": "Succeeded to update model weights."})

    async def _reload_weights(self, request: web.Request) -> web.Response:
        body = await request.json()
        if self.refuses_loads:
            return _error(500, "Call to collective_rpc method failed: no such layer", "InternalServerError")
        assert body["method"] == "reload_weights"
        folder = body["kwargs"]["weights_path"]
        self.loads.append(folder)
        if not self.stale:
            self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        return web.json_response({"results": [None]})

    async def _reset_prefix_cache(self, _: web.Request) -> web.Response:
        self.resets += 1
        return web.Response()

    async def _name_weights(self, request: web.Request) -> web.Response:
        self.weights_version = (await request.json())["new_version"]
        return web.json_response({"success": True, "new_version": self.weights_version})

    async def _info(self, _: web.Request) -> web.Response:
        return web.json_response({"weight_version": self.weights_version})

    def forget(self) -> None:
        """Load what it was started on, as a restart does."""
        self.model, self.adapters, self.weights_version = AutoModelForCausalLM.from_pretrained(self.folder).eval(), [], "default"

    # ------------------------------------------------------------------ what it says
    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if len(self.asked) + 1 == self.restarts_before:
            self.forget()
            self.restarts_before = 0
        if body["model"] not in [*self.bases, *self.adapters]:
            return _error(404, f"The model `{body['model']}` does not exist.", "NotFoundError", param="model")
        assert body.get("seed", 0) < 2**63
        adapter = body["model"] in self.adapters
        echo = body["model"] if adapter else self.bases[0]
        self._choose(body["model"] if adapter else "")
        choice: dict[str, Any] = {"index": 0, "text": "not looked at"}
        if "prompt_logprobs" in body:
            rows = [None, *({str(i): {"logprob": v}} for i, v in self.score(body["prompt"]))]
            return web.json_response({"model": echo, "choices": [choice | {"prompt_logprobs": rows, "finish_reason": "length"}]})

        def say(ids: list[int], logprobs: list[float], finish: str) -> Any:
            told = {"tokens": [f"token_id:{i}" for i in ids], "token_logprobs": logprobs}
            return {"model": echo, "choices": [choice | {"logprobs": told, "finish_reason": finish}]}

        assert body["ignore_eos"] and body["return_tokens_as_token_ids"]
        return await self._answer(request, body, body["prompt"], body, body["max_tokens"], body["seed"], say)

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        settings, adapter = body["sampling_params"], body.get("lora_path", "")
        if adapter and adapter not in self.adapters:
            return web.json_response({"error": {"message": f"{adapter} was not loaded"}}, status=400)
        self._choose(adapter)
        meta = {"weight_version": self.weights_version}
        if "logprob_start_len" in body:
            pairs = [[None, body["input_ids"][0], None], *([v, i, None] for i, v in self.score(body["input_ids"]))]
            return web.json_response({"meta_info": meta | {"input_token_logprobs": pairs, "finish_reason": {"type": "length"}}})

        def say(ids: list[int], logprobs: list[float], finish: str) -> Any:
            pairs = [[value, token, None] for value, token in zip(logprobs, ids)]
            return {"text": "not looked at", "meta_info": meta | {"output_token_logprobs": pairs, "finish_reason": {"type": finish}}}

        seed, count = settings["sampling_seed"], settings["max_new_tokens"]
        return await self._answer(request, body, body["input_ids"], settings, count, seed, say)

    async def _answer(
        self,
        request: web.Request,
        body: Mapping[str, Any],
        prompt: list[int],
        settings: Mapping[str, Any],
        count: int,
        seed: int,
        say: Callable[[list[int], list[float], str], Any],
    ) -> web.StreamResponse:
        assert settings["repetition_penalty"] == 1.0 and settings["min_p"] == 0.0
        self.asked.append(body)
        fault, order = next(self.faults, Fault("ok")), len(self.asked)
        if fault.kind == "status":
            headers = {"Retry-After": fault.retry_after} if fault.retry_after else {}
            return web.json_response({"error": "injected"}, status=fault.status, headers=headers)
        if fault.kind == "drop":
            assert request.transport is not None
            request.transport.abort()
        if fault.kind == "hang":
            await self._bye.wait()
        if fault.kind == "garbage":
            return web.Response(text="<html>502 but says 200</html>")
        ids, logprobs, finish = self.draw(prompt, settings, count, seed)
        if fault.kind == "abort":
            ids, logprobs, finish = ids[:1], logprobs[:1], "abort"
        if fault.kind == "nan":
            logprobs[-1] = math.nan
        await asyncio.sleep(fault.seconds + 0.02 * max(0, self.backwards - order))
        return web.json_response(say(ids, logprobs, finish))

    # ------------------------------------------------------------------ the miniature
    def _choose(self, adapter: str) -> None:
        if adapter:
            self.model.set_adapter(adapter)

    @torch.no_grad()
    def logits(self, ids: list[int]) -> torch.Tensor:
        return self.model(input_ids=torch.tensor([ids])).logits[0].float()

    def score(self, ids: list[int]) -> list[tuple[int, float]]:
        values = self.logits(ids)[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        return list(zip(ids[1:], values.tolist()))

    def draw(self, prompt: list[int], settings: Mapping[str, Any], count: int, seed: int) -> tuple[list[int], list[float], str]:
        """As the engines in process do: one uniform number for each token, from the seed of the answer."""
        uniform = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        shape = {"temperature": float(settings["temperature"]), "top_p": float(settings["top_p"]), "top_k": max(0, settings["top_k"])}
        ids: list[int] = []
        logprobs: list[float] = []
        for number in uniform:
            row = self.logits([*prompt, *ids])[-1:]
            token, logprob = draw_tokens(row, number[None], **shape)
            ids.append(int(token))
            logprobs.append(float(row.log_softmax(-1)[0, int(token)] if self.raw else logprob))
            if ids[-1] in settings["stop_token_ids"]:
                return ids, logprobs, "stop"
        return ids, logprobs, "length"
