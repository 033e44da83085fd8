"""vLLM: POST /v1/completions, and /v1/chat/completions for prompts with images; or POST /inference/v1/generate for all."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from lit_rl.errors import ConfigError
from lit_rl.rollouts.base import Sampling
from lit_rl.rollouts.dialects import Answer, Asked, Body, Dialect, Unreadable, Unusable, answer_of, choice_of, drawing, numbers, text_of

PROBED = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 1}
"""Settings that ask for the log-probabilities of a prompt."""

OTHERS = "its log-probabilities are of other tokens than it answers with"


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
    """POST /v1/completions with token ids as prompt: any vLLM has it. The version of whole weights is asked for after the answers.

    A prompt with pictures goes to POST /v1/chat/completions, whose server writes it out by its own chat template and tells the ids.
    """

    version_route = "/weight_info"

    def ask(self, asked: Asked, sampling: Sampling, *, seed: int, stops: Sequence[int], model: str) -> tuple[str, Body]:
        settings = _settings(sampling, seed, stops, asked.banned)
        if asked.pictures:
            return self._chat(asked, model, **settings | {"logprobs": True, "top_logprobs": 0})
        return self._completions(asked.prompt, model, **settings)

    def read(self, body: object) -> Answer:
        choice = choice_of(body)
        if "message" in choice:
            return self._read_chat(body, choice)
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

    def _read_chat(self, body: object, choice: Body) -> Answer:
        ids = choice.get("token_ids")
        if not isinstance(ids, list):
            raise Unusable("it does not tell the ids of its tokens (return_token_ids) in chat completions: update vLLM")
        rows = _rows(choice.get("logprobs"))
        if [row.get("token") for row in rows] != [f"token_id:{token}" for token in ids]:
            raise Unreadable(OTHERS)
        logprobs, prompt = [row.get("logprob") for row in rows], self.prompt_of(body)
        return answer_of(ids, logprobs, choice.get("finish_reason"), model=text_of(body, "model"), prompt=prompt)

    def logprobs(self, asked: Asked, *, first: int, model: str) -> tuple[str, Body]:
        if asked.pictures:
            return self._chat(asked, model, **PROBED)
        return self._completions(asked.prompt, model, **PROBED)

    def read_logprobs(self, body: object, ids: Sequence[int], *, first: int) -> list[float]:
        choice = choice_of(body)
        told = body if "message" in choice else choice
        return _prompt_logprobs(told.get("prompt_logprobs") if isinstance(told, Mapping) else None, ids, first)

    def _completions(self, prompt: Sequence[int], model: str, **settings: object) -> tuple[str, Body]:
        fixed = {"n": 1, "stream": False, "return_tokens_as_token_ids": True, "skip_special_tokens": False}
        return "/v1/completions", {"model": model, "prompt": list(prompt), **fixed, **settings}

    def _chat(self, asked: Asked, model: str, **settings: object) -> tuple[str, Body]:
        if "messages" not in asked.chat:
            raise ConfigError(
                "engine.dialect=openai sends images within the conversation of a row of the data, and this prompt comes from none: set it "
                "to vllm, and start vLLM with --enable-scale-out"
            )
        fixed = {"n": 1, "stream": False, "return_tokens_as_token_ids": True, "return_token_ids": True, "skip_special_tokens": False}
        return "/v1/chat/completions", {"model": model, **asked.chat, **fixed, **settings}


class Generate(VLLM):
    """POST /inference/v1/generate of a server with --enable-scale-out: no text is made, and each answer tells its weights' version.

    A prompt has one place for each of its pictures; the server makes as many of it as it reads pieces of the picture, and tells them.
    """

    def ask(self, asked: Asked, sampling: Sampling, *, seed: int, stops: Sequence[int], model: str) -> tuple[str, Body]:
        return self._generate(asked, model, **_settings(sampling, seed, stops, asked.banned))

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
        rows = _rows(choice.get("logprobs"))
        if [row.get("token_id") for row in rows] != ids:
            raise Unreadable(OTHERS)
        logprobs, finish = [row.get("logprob") for row in rows], choice.get("finish_reason")
        return answer_of(ids, logprobs, finish, model=text_of(body, "model"), versions=versions, prompt=self.prompt_of(body))

    def logprobs(self, asked: Asked, *, first: int, model: str) -> tuple[str, Body]:
        return self._generate(asked, model, **PROBED)

    def read_logprobs(self, body: object, ids: Sequence[int], *, first: int) -> list[float]:
        return _prompt_logprobs(body.get("prompt_logprobs") if isinstance(body, Mapping) else None, ids, first)

    def _generate(self, asked: Asked, model: str, **settings: object) -> tuple[str, Body]:
        drawn = {"n": 1, "detokenize": False, **settings}
        parts = [{"type": "image_url", "url": url} for url in asked.pictures]
        seen: Body = {"content_parts": parts, "return_token_ids": True} if parts else {}
        body = {"model": model, "token_ids": list(asked.prompt), "sampling_params": drawn, "stream": False}
        return "/inference/v1/generate", {**body, **seen}


def _settings(sampling: Sampling, seed: int, stops: Sequence[int], banned: Sequence[int]) -> dict[str, object]:
    """The server's own end of text may be another one; with `ignore_eos` only ours ends an answer."""
    ends = {"max_tokens": sampling.max_new_tokens, "stop_token_ids": list(stops), "ignore_eos": True}
    return {**ends, "seed": seed, "logprobs": 0, **drawing(sampling, banned)}


def _rows(told: object) -> list[Body]:
    """Tokens with their log-probabilities, of /inference/v1/generate and of chat completions."""
    content = told.get("content") if isinstance(told, Mapping) else None
    if not isinstance(content, list) or not all(isinstance(row, Mapping) for row in content):
        raise Unreadable("it has no log-probabilities")
    return content


def _prompt_logprobs(rows: object, ids: Sequence[int], first: int) -> list[float]:
    if not isinstance(rows, list) or len(rows) != len(ids):
        raise Unreadable(f"it has no prompt_logprobs of {len(ids)} tokens")
    try:
        return numbers([row[str(token)]["logprob"] for row, token in zip(rows[first:], ids[first:])])
    except (KeyError, TypeError) as error:
        raise Unreadable(f"its prompt_logprobs do not name the prompt's tokens: {error}") from error
