"""vLLM: POST /v1/completions, or POST /inference/v1/generate, which says which weights drew each token. Token ids both ways."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from lit_rl.rollouts.base import Sampling
from lit_rl.rollouts.dialects import Answer, Asked, Body, Dialect, Unreadable, Unusable, answer_of, choice_of, drawing, numbers, text_of


class VLLM(Dialect):
    """Requests name a model or an adapter. All weights are exchanged by vLLM's routes of development."""

    tells_models = True
    settings_route = "/server_info?config_format=json"

    def load_adapter(self, name: str, folder: str) -> tuple[str, Body]:
        return "/v1/load_lora_adapter", {"lora_name": name, "lora_path": folder}

    def unload_adapter(self, name: str) -> tuple[str, Body]:
        return "/v1/unload_lora_adapter", {"lora_name": name}

    def load_weights(self, name: str, folder: str) -> list[tuple[str, Body]]:
        """The prefix cache holds keys and values of the old weights until it is reset, and answers long prompts from them.

        It is not reset while a request runs, such as one that was just given up, unless that begins anew.

        The exchange drops what the vision tower made of images, which requests look for in vain unless its caches are reset, too.
        """
        reload: Body = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
        named: Body = {"new_version": name}
        caches = ["/reset_prefix_cache?reset_running_requests=true", "/reset_mm_cache", "/reset_encoder_cache"]
        return [("/collective_rpc", reload), *((route, {}) for route in caches), ("/update_weight_version", named)]


class OpenAI(VLLM):
    """POST /v1/completions with token ids as prompt: any vLLM has it. The version of whole weights is asked for after the answers."""

    version_route = "/weight_info"

    def ask(self, asked: Asked, sampling: Sampling, *, seed: int, stops: Sequence[int], model: str) -> tuple[str, Body]:
        return self._completions(asked.prompt, model, **_settings(sampling, seed, stops, asked.banned))

    def read(self, body: object) -> Answer:
        choice = choice_of(body)
        logprobs = choice.get("logprobs")
        if not isinstance(logprobs, Mapping) or not isinstance(logprobs.get("tokens"), list):
            raise Unreadable("it has no log-probabilities")
        tokens = logprobs["tokens"]
        if not all(re.fullmatch(r"token(_id)?:\d+", str(token)) for token in tokens):
            raise Unusable(
                f"it answers with the texts of tokens ({tokens[:3]}), not with their ids (return_tokens_as_token_ids): update it"
            )
        ids = [int(token.rpartition(":")[2]) for token in tokens]
        return answer_of(ids, logprobs.get("token_logprobs"), choice.get("finish_reason"), model=text_of(body, "model"))

    def logprobs(self, ids: Sequence[int], *, model: str) -> tuple[str, Body]:
        return self._completions(ids, model, max_tokens=1, temperature=0.0, prompt_logprobs=1)

    def read_logprobs(self, body: object, ids: Sequence[int]) -> list[float]:
        return _prompt_logprobs(choice_of(body).get("prompt_logprobs"), ids)

    def _completions(self, prompt: Sequence[int], model: str, **settings: object) -> tuple[str, Body]:
        fixed = {"n": 1, "stream": False, "return_tokens_as_token_ids": True, "skip_special_tokens": False}
        return "/v1/completions", {"model": model, "prompt": list(prompt), **fixed, **settings}


class Generate(VLLM):
    """POST /inference/v1/generate of a server with --enable-scale-out: no text is made, and each answer tells its weights' version.

    A prompt has one place for each of its pictures; the server makes as many of it as it reads pieces of the picture, and tells them.
    """

    sends_pictures = True

    def ask(self, asked: Asked, sampling: Sampling, *, seed: int, stops: Sequence[int], model: str) -> tuple[str, Body]:
        route, body = self._generate(asked.prompt, model, **_settings(sampling, seed, stops, asked.banned))
        parts = [{"type": "image_url", "url": url} for url in asked.pictures]
        return route, {**body, "content_parts": parts, "return_token_ids": True} if parts else body

    def read(self, body: object) -> Answer:
        choice = choice_of(body)
        ids, spans = choice.get("token_ids"), choice.get("weight_versions")
        if not isinstance(ids, list):
            raise Unreadable("it has no `token_ids`")
        if not isinstance(spans, list) or not all(isinstance(span, Mapping) and "version" in span for span in spans):
            raise Unusable(
                "it does not tell which weights drew its tokens (`weight_versions`): update vLLM, or set engine.dialect to openai"
            )
        versions = [str(span["version"]) for span in spans]
        logprobs = _logprobs(choice.get("logprobs"), ids)
        told = body.get("prompt_token_ids") if isinstance(body, Mapping) else None
        prompt = told if isinstance(told, list) else None
        return answer_of(ids, logprobs, choice.get("finish_reason"), model=text_of(body, "model"), versions=versions, prompt=prompt)

    def logprobs(self, ids: Sequence[int], *, model: str) -> tuple[str, Body]:
        return self._generate(ids, model, max_tokens=1, temperature=0.0, prompt_logprobs=1)

    def read_logprobs(self, body: object, ids: Sequence[int]) -> list[float]:
        return _prompt_logprobs(body.get("prompt_logprobs") if isinstance(body, Mapping) else None, ids)

    def _generate(self, prompt: Sequence[int], model: str, **settings: object) -> tuple[str, Body]:
        drawn = {"n": 1, "detokenize": False, **settings}
        return "/inference/v1/generate", {"model": model, "token_ids": list(prompt), "sampling_params": drawn, "stream": False}


def _settings(sampling: Sampling, seed: int, stops: Sequence[int], banned: Sequence[int]) -> dict[str, object]:
    """The server's own end of text may be another one; with `ignore_eos` only ours ends an answer."""
    ends = {"max_tokens": sampling.max_new_tokens, "stop_token_ids": list(stops), "ignore_eos": True}
    return {**ends, "seed": seed, "logprobs": 0, **drawing(sampling, banned)}


def _logprobs(told: object, ids: Sequence[object]) -> list[object]:
    """Log-probabilities in /inference/v1/generate, of the tokens in `ids`."""
    content = told.get("content") if isinstance(told, Mapping) else None
    if not isinstance(content, list) or not all(isinstance(row, Mapping) for row in content):
        raise Unreadable("it has no log-probabilities")
    if [row.get("token_id") for row in content] != list(ids):
        raise Unreadable("its log-probabilities are of other tokens than it answers with")
    return [row.get("logprob") for row in content]


def _prompt_logprobs(rows: object, ids: Sequence[int]) -> list[float]:
    if not isinstance(rows, list) or len(rows) != len(ids):
        raise Unreadable(f"it has no prompt_logprobs of {len(ids)} tokens")
    try:
        return numbers([row[str(token)]["logprob"] for row, token in zip(rows[1:], ids[1:])])
    except (KeyError, TypeError) as error:
        raise Unreadable(f"its prompt_logprobs do not name the prompt's tokens: {error}") from error
