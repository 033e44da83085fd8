"""vLLM's routes over a miniature, with the statuses and sentences of vLLM 0.32. `contract.py` holds both to the same checks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aiohttp import web
from rollouts.fake_weights import Handler, Holding

GUARDED = ("/v1", "/inference")
"""Paths that a token is needed for."""


def error(status: int, message: str, kind: str, param: str | None = None) -> web.Response:
    return web.json_response({"error": {"message": message, "type": kind, "param": param, "code": status}}, status=status)


def bad(message: str, param: str | None = None) -> web.Response:
    return error(400, message, "BadRequestError", param)


class VLLMRoutes(Holding):
    """A server with --enable-lora, --enable-scale-out, VLLM_ALLOW_RUNTIME_LORA_UPDATING and VLLM_SERVER_DEV_MODE."""

    def vllm_routes(self) -> list[web.RouteDef]:
        posts: dict[str, Handler] = {
            "/v1/completions": self._completions,
            "/inference/v1/generate": self._tokens,
            "/v1/load_lora_adapter": self._load,
            "/v1/unload_lora_adapter": self._unload,
            "/collective_rpc": self._rpc,
            "/reset_prefix_cache": self._reset_prefix_cache,
            "/reset_mm_cache": self._done,
            "/reset_encoder_cache": self._done,
            "/update_weight_version": self._name_weights,
            "/pause": self._pause,
            "/resume": self._resume,
            "/sleep": self._sleep,
            "/wake_up": self._wake_up,
            "/abort_requests": self._abort_requests,
            "/weight_checker": self._checker,
        }
        gets: dict[str, Handler] = {
            "/v1/models": self._models,
            "/weight_info": self._info,
            "/server_info": self._server_info,
            "/is_paused": self._is_paused,
            "/is_sleeping": self._is_sleeping,
        }
        self.paused = self.sleeping = False
        return [*(web.post(r, self._guarded(h)) for r, h in posts.items()), *(web.get(r, self._guarded(h)) for r, h in gets.items())]

    def _guarded(self, handler: Handler) -> Handler:
        async def guarded(request: web.Request) -> web.StreamResponse:
            if self.token and request.path.startswith(GUARDED) and request.headers.get("Authorization") != f"Bearer {self.token}":
                return web.json_response({"error": "Unauthorized"}, status=401)
            return await handler(request)

        return guarded

    # ------------------------------------------------------------------ what it holds
    async def _models(self, _: web.Request) -> web.Response:
        bases = [{"id": name, "object": "model", "parent": None, "max_model_len": self.max_model_len} for name in self.bases]
        adapters = [{"id": name, "object": "model", "parent": self.bases[0], "max_model_len": None} for name in self.adapters]
        return web.json_response({"object": "list", "data": [*bases, *adapters]})

    async def _load(self, request: web.Request) -> web.Response:
        body = await request.json()
        name, folder = body["lora_name"], body.get("lora_path")
        if folder is None:
            return error(400, "1 validation error: Field required", "Bad Request", param="body.lora_path")
        if self.refuses_loads:
            return web.json_response({"detail": "Not Found"}, status=404)
        if name in self.adapters:
            return error(400, f"The lora adapter '{name}' has already been loaded.", "InvalidUserInput")
        if not Path(folder).is_dir():
            return error(404, f"Loading lora {name} failed: No adapter found for {folder}", "NotFoundError")
        try:
            self.add_adapter(name, folder)
        except ValueError as wrong:
            return error(500, f"Call to add_lora method failed: Worker failed with error '{wrong}'", "InternalServerError")
        return web.Response(text=f"Success: LoRA adapter '{name}' added successfully.")

    async def _unload(self, request: web.Request) -> web.Response:
        name = (await request.json())["lora_name"]
        if name not in self.adapters:
            return error(404, f"The lora adapter '{name}' cannot be found.", "NotFoundError")
        self.remove_adapter(name)
        return web.Response(text=f"Success: LoRA adapter '{name}' removed successfully.")

    async def _rpc(self, request: web.Request) -> web.Response:
        """After weights that could not be loaded the engine dies of the next request."""
        body = await request.json()
        if "method" not in body:
            return error(400, "Missing 'method' in request body", "Bad Request")
        folder = body.get("kwargs", {}).get("weights_path", "")
        failed = "Call to collective_rpc method failed: Worker failed with error "
        if self.refuses_loads or body["method"] != "reload_weights":
            return error(500, f"{failed}'no such layer'", "InternalServerError")
        if not Path(folder).is_dir():
            self.dead = True
            return error(500, f"{failed}'Repo id must use alphanumeric chars: {folder}'", "InternalServerError")
        self.loads.append(folder)
        if not self.stale:
            self.load_model(folder)
        return web.json_response({"results": [None]})

    async def _done(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _reset_prefix_cache(self, request: web.Request) -> web.Response:
        done = not self.at_once or request.query.get("reset_running_requests") == "true"
        self.resets += done
        return web.json_response({"success": done})

    async def _name_weights(self, request: web.Request) -> web.Response:
        self.weights_version = (await request.json())["new_version"]
        return web.json_response({"success": True, "new_version": self.weights_version})

    async def _info(self, _: web.Request) -> web.Response:
        return web.json_response({"weight_version": self.weights_version})

    async def _server_info(self, _: web.Request) -> web.Response:
        if not self.tells_settings:
            return web.json_response({"detail": "Not Found"}, status=404)
        mode = "raw_logprobs" if self.raw else "processed_logprobs"
        model = {"dtype": str(self.dtype), "max_model_len": self.max_model_len, "logprobs_mode": mode}
        return web.json_response({"vllm_config": {"model_config": model}})

    async def _pause(self, _: web.Request) -> web.Response:
        self.paused = True
        return web.json_response({"status": "paused"})

    async def _resume(self, _: web.Request) -> web.Response:
        self.paused = False
        return web.json_response({"status": "resumed"})

    async def _is_paused(self, _: web.Request) -> web.Response:
        return web.json_response({"is_paused": self.paused})

    async def _sleep(self, _: web.Request) -> web.Response:
        self.sleeping = True
        return web.json_response({"status": "sleeping", "level": 1})

    async def _wake_up(self, _: web.Request) -> web.Response:
        self.sleeping = False
        return web.json_response({"status": "awake", "tags": None})

    async def _is_sleeping(self, _: web.Request) -> web.Response:
        return web.json_response({"is_sleeping": self.sleeping})

    async def _abort_requests(self, _: web.Request) -> web.Response:
        return web.json_response({"status": "aborted", "aborted": 0})

    async def _checker(self, request: web.Request) -> web.Response:
        assert (await request.json())["action"] == "checksum"
        return web.json_response(
            {"checksums": {name: f"{float(weight.double().sum()):g}" for name, weight in self.model.named_parameters()}}
        )

    # ------------------------------------------------------------------ what it says
    def _wrong(self, body: Mapping[str, Any], prompt: list[int], count: int) -> web.Response | None:
        if len(self.asked) + 1 == self.restarts_before:
            self.forget()
            self.restarts_before = 0
        if self.dead:
            return error(500, "EngineCore encountered an issue. See stack trace (above) for the root cause.", "InternalServerError")
        if body["model"] not in [*self.bases, *self.adapters]:
            aliases = ", ".join(self.bases)
            return error(404, f"The model `{body['model']}` does not exist. Valid aliases: {aliases}.", "NotFoundError", param="model")
        if not prompt:
            return bad("You must pass at least one prompt")
        if count > self.max_model_len:
            return bad(f"max_tokens={count} cannot be greater than max_model_len={self.max_model_len}.", "max_tokens")
        if len(prompt) >= self.max_model_len:
            return bad("max_tokens must be at least 1, got 0. (parameter=max_tokens, value=0)", "max_tokens")
        if (highest := max(prompt)) >= self.model.config.get_text_config().vocab_size:
            return bad(f"Token id {highest} is out of vocabulary")
        return None

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        prompt, count, seed = self.prompt_with(body["prompt"], ()), body["max_tokens"], body.get("seed", 0)
        if seed >= 2**63:
            return error(400, f"1 validation error: less than or equal to {2**63 - 1}", "Bad Request", param="body.seed")
        if wrong := self._wrong(body, prompt, count):
            return wrong
        named, both = body["return_tokens_as_token_ids"], body.get("return_token_ids", False)
        choice: dict[str, Any] = {"index": 0, "text": "not looked at", "finish_reason": "length", "logprobs": None}
        whole = {"object": "text_completion", "model": self._chosen(body["model"])}
        if "prompt_logprobs" in body:
            return web.json_response(whole | {"choices": [choice | {"prompt_logprobs": self._prompt_logprobs(prompt)}]})

        def say(ids: list[int], logprobs: list[float], finish: str) -> Any:
            told = {"tokens": [f"token_id:{i}" if named else "?" for i in ids], "token_logprobs": logprobs}
            tokens = {"token_ids": ids if both else None, "prompt_token_ids": prompt if both else None}
            return whole | {"choices": [choice | tokens | {"logprobs": told, "finish_reason": finish}]}

        assert body["ignore_eos"]
        return await self.answer(request, body, prompt, body, min(count, self.max_model_len - len(prompt)), seed, say)

    async def _tokens(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        prompt = self.prompt_with(body["token_ids"], [part["url"] for part in body.get("content_parts", ())])
        settings = body["sampling_params"]
        count = settings["max_tokens"]
        if wrong := self._wrong(body, prompt, count):
            return wrong
        whole = {"model": self._chosen(body["model"]), "output_mode": "tokens", "prompt_logprobs": None}
        whole["prompt_token_ids"] = prompt if body.get("return_token_ids") else None
        if "prompt_logprobs" in settings:
            return web.json_response(whole | {"choices": [{"index": 0}], "prompt_logprobs": self._prompt_logprobs(prompt)})

        def say(ids: list[int], logprobs: list[float], finish: str) -> Any:
            rows = [{"token_id": i, "logprob": value, "top_logprobs": []} for i, value in zip(ids, logprobs)]
            spans = [{"version": version, "start": start, "end": end} for version, start, end in self.spans(len(ids))]
            choice = {"index": 0, "finish_reason": finish, "token_ids": ids, "weight_versions": spans, "logprobs": {"content": rows}}
            return whole | {"choices": [choice]}

        assert settings["ignore_eos"]
        most = min(count, self.max_model_len - len(prompt))
        return await self.answer(request, body, prompt, settings, most, settings["seed"], say)

    def spans(self, count: int) -> list[tuple[str, int, int]]:
        """Versions of the weights that drew an answer of so many tokens."""
        return [(self.weights_version, 0, count)]

    def _chosen(self, model: str) -> str:
        """The name that the answer says; the weights of that name answer."""
        adapter = model in self.adapters
        self.choose(model if adapter else "")
        return model if adapter else self.bases[0]

    def _prompt_logprobs(self, prompt: list[int]) -> list[Any]:
        return [None, *({str(i): {"logprob": v, "rank": 1}} for i, v in self.score(prompt))]
