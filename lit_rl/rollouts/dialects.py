"""Requests to inference servers and their answers: vLLM's completions and SGLang's /generate, token ids both ways."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lit_rl.rollouts.base import Sampling

Body = Mapping[str, object]


class Unreadable(Exception):
    """The server's answer does not fit the request. The message says what is wrong with it."""


class Unusable(Exception):
    """The server understood and its answer is of no use: asking again would not help."""


@dataclass(frozen=True)
class Answer:
    """Tokens and their log-probabilities. finish: stop, length or abort. echo: name or version of the weights, where the server tells."""

    ids: list[int]
    logprobs: list[float]
    finish: str
    echo: str | None


class Dialect(ABC):
    """Requests as (route, body), answers from parsed JSON; knows no connection."""

    tells_models = False
    """True when requests name a model, out of those that `GET /v1/models` lists."""

    version_route: str | None = None
    """Where a server tells the version of its whole weights, if their answers do not."""

    @abstractmethod
    def ask(self, prompt: Sequence[int], sampling: Sampling, *, seed: int, stops: Sequence[int], model: str) -> tuple[str, Body]:
        """One answer. model: the name it is served under; of the adapter where one answers."""

    @abstractmethod
    def read(self, body: object) -> Answer:
        """Raises Unreadable, Unusable."""

    @abstractmethod
    def logprobs(self, ids: Sequence[int], *, model: str) -> tuple[str, Body]:
        """Log-probabilities of given tokens."""

    @abstractmethod
    def read_logprobs(self, body: object, ids: Sequence[int]) -> list[float]:
        """Those of `ids[1:]`, at temperature 1. Raises Unreadable, Unusable."""

    @abstractmethod
    def load_adapter(self, name: str, folder: str) -> tuple[str, Body]:
        """Take up a PEFT adapter under a new name."""

    @abstractmethod
    def unload_adapter(self, name: str) -> tuple[str, Body]:
        """Forget one."""

    @abstractmethod
    def load_weights(self, name: str, folder: str) -> list[tuple[str, Body]]:
        """Exchange all weights for those of a folder in transformers format: requests to be made one after the other."""

    def forgotten(self, name: str) -> str:
        """Pattern in a refusal (status 4xx) of a server that does not hold the adapter of that name."""
        return rf"{re.escape(name)}.*(does not exist|not loaded|never loaded|not found)"

    def read_load(self, body: object) -> None:
        """Check the answer to one of the three requests above, where the server says more than a status. Raises Unusable."""
        if isinstance(body, Mapping) and body.get("success") is False:
            raise Unusable(f"it could not load the weights: {body.get('error_message') or body.get('message') or body}")


class OpenAI(Dialect):
    """vLLM: POST /v1/completions with token ids as prompt. All weights are exchanged by its routes of development."""

    tells_models = True
    version_route = "/weight_info"

    def ask(self, prompt: Sequence[int], sampling: Sampling, *, seed: int, stops: Sequence[int], model: str) -> tuple[str, Body]:
        settings = {"max_tokens": sampling.max_new_tokens, "seed": seed, "stop_token_ids": list(stops), **_drawing(sampling)}
        # The server's own end of text may be another one; without it only ours ends an answer.
        return self._completions(prompt, model, **settings, logprobs=0, ignore_eos=True)

    def read(self, body: object) -> Answer:
        choice = _choice(body)
        logprobs = choice.get("logprobs")
        if not isinstance(logprobs, Mapping) or not isinstance(logprobs.get("tokens"), list):
            raise Unreadable("it has no log-probabilities")
        tokens = logprobs["tokens"]
        if not all(re.fullmatch(r"token(_id)?:\d+", str(token)) for token in tokens):
            raise Unusable(
                f"it answers with the texts of tokens ({tokens[:3]}), not with their ids (return_tokens_as_token_ids): update it"
            )
        ids = [int(token.rpartition(":")[2]) for token in tokens]
        return _answer(ids, logprobs.get("token_logprobs"), choice.get("finish_reason"), _text(body, "model"))

    def logprobs(self, ids: Sequence[int], *, model: str) -> tuple[str, Body]:
        return self._completions(ids, model, max_tokens=1, temperature=0.0, prompt_logprobs=1)

    def read_logprobs(self, body: object, ids: Sequence[int]) -> list[float]:
        rows = _choice(body).get("prompt_logprobs")
        if not isinstance(rows, list) or len(rows) != len(ids):
            raise Unreadable(f"it has no prompt_logprobs of {len(ids)} tokens")
        try:
            return _numbers([row[str(token)]["logprob"] for row, token in zip(rows[1:], ids[1:])])
        except (KeyError, TypeError) as error:
            raise Unreadable(f"its prompt_logprobs do not name the prompt's tokens: {error}") from error

    def load_adapter(self, name: str, folder: str) -> tuple[str, Body]:
        return "/v1/load_lora_adapter", {"lora_name": name, "lora_path": folder}

    def unload_adapter(self, name: str) -> tuple[str, Body]:
        return "/v1/unload_lora_adapter", {"lora_name": name}

    def load_weights(self, name: str, folder: str) -> list[tuple[str, Body]]:
        """The prefix cache holds keys and values of the old weights until it is reset, and answers long prompts from them."""
        reload: Body = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
        named: Body = {"new_version": name}
        return [("/collective_rpc", reload), ("/reset_prefix_cache", {}), ("/update_weight_version", named)]

    def _completions(self, prompt: Sequence[int], model: str, **settings: object) -> tuple[str, Body]:
        fixed = {"n": 1, "stream": False, "return_tokens_as_token_ids": True, "skip_special_tokens": False}
        return "/v1/completions", {"model": model, "prompt": list(prompt), **fixed, **settings}


class SGLang(Dialect):
    """POST /generate with input_ids. Adapters are named in `lora_path`. Seeds count where the server samples deterministically."""

    def ask(self, prompt: Sequence[int], sampling: Sampling, *, seed: int, stops: Sequence[int], model: str) -> tuple[str, Body]:
        drawing = {"max_new_tokens": sampling.max_new_tokens, "sampling_seed": seed, "stop_token_ids": list(stops), **_drawing(sampling)}
        return self._generate(prompt, model, {**drawing, "skip_special_tokens": False})

    def read(self, body: object) -> Answer:
        meta = _meta(body)
        finish = meta.get("finish_reason")
        pairs = _pairs(meta, "output_token_logprobs")
        version = meta.get("weight_version")
        reason = finish.get("type") if isinstance(finish, Mapping) else finish
        return _answer([int(pair[1]) for pair in pairs], [pair[0] for pair in pairs], reason, None if version is None else str(version))

    def logprobs(self, ids: Sequence[int], *, model: str) -> tuple[str, Body]:
        return self._generate(ids, model, {"max_new_tokens": 1, "temperature": 0.0}, logprob_start_len=0)

    def read_logprobs(self, body: object, ids: Sequence[int]) -> list[float]:
        pairs = _pairs(_meta(body), "input_token_logprobs")
        if [pair[1] for pair in pairs] != list(ids):
            raise Unreadable("its input_token_logprobs are not of the prompt's tokens")
        return _numbers([pair[0] for pair in pairs[1:]])

    def load_adapter(self, name: str, folder: str) -> tuple[str, Body]:
        return "/load_lora_adapter", {"lora_name": name, "lora_path": folder}

    def unload_adapter(self, name: str) -> tuple[str, Body]:
        return "/unload_lora_adapter", {"lora_name": name}

    def load_weights(self, name: str, folder: str) -> list[tuple[str, Body]]:
        return [("/update_weights_from_disk", {"model_path": folder, "weight_version": name, "abort_all_requests": True})]

    def _generate(self, prompt: Sequence[int], model: str, sampling: Body, **settings: object) -> tuple[str, Body]:
        adapter = {"lora_path": model} if model else {}
        body = {"input_ids": list(prompt), "sampling_params": sampling, "return_logprob": True, "stream": False}
        return "/generate", {**body, **adapter, **settings}


DIALECTS: Mapping[str, Dialect] = {"openai": OpenAI(), "sglang": SGLang()}


def served_models(body: object) -> dict[str, int | None]:
    """Base models by name in the answer to `GET /v1/models`, and the tokens of prompt and answer that each takes, where the server tells.

    Adapters, which name the model that they are of as `parent`, are left out.
    """
    rows = body.get("data") if isinstance(body, Mapping) else None
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) and "id" in row for row in rows):
        raise Unreadable("it lists no models")
    return {row["id"]: row.get("max_model_len") for row in rows if row.get("parent") is None}


def weight_version(body: object) -> str:
    """The answer to `GET /weight_info`. Raises Unreadable."""
    told = _text(body, "weight_version")
    if told is None:
        raise Unreadable("it tells no `weight_version`")
    return told


def _drawing(sampling: Sampling) -> dict[str, float]:
    """Everything that shapes the distribution, said out loud: what is left out comes from the model's generation_config."""
    shape = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k or -1}
    return {**shape, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}


def _choice(body: object) -> Mapping[str, object]:
    choices = body.get("choices") if isinstance(body, Mapping) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], Mapping):
        raise Unreadable("it has no `choices` with one answer")
    return choices[0]


def _text(body: object, name: str) -> str | None:
    value = body.get(name) if isinstance(body, Mapping) else None
    return None if value is None else str(value)


def _meta(body: object) -> Mapping[str, object]:
    meta = body.get("meta_info") if isinstance(body, Mapping) else None
    if not isinstance(meta, Mapping):
        raise Unreadable("it has no `meta_info`")
    return meta


def _pairs(meta: Mapping[str, object], name: str) -> list[list[float]]:
    pairs = meta.get(name)
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) >= 2 for pair in pairs):
        raise Unreadable(f"it has no {name}")
    return pairs


def _answer(ids: list[int], logprobs: object, finish: object, echo: str | None) -> Answer:
    if finish == "abort":
        return Answer([], [], "abort", echo)  # what there was of it is drawn again
    if finish not in ("stop", "length"):
        raise Unreadable(f"it ends for the reason {finish!r}")
    if not isinstance(logprobs, list) or len(logprobs) != len(ids):
        raise Unreadable(f"it has {len(ids)} tokens and not as many log-probabilities")
    if not ids:
        raise Unreadable("it has no token")
    return Answer(ids, _numbers(logprobs), finish, echo)


def _numbers(values: Sequence[object]) -> list[float]:
    """Raises Unusable where one is missing or not finite."""
    found = [float(value) if isinstance(value, int | float) else math.nan for value in values]
    wrong = next((i for i, value in enumerate(found) if not math.isfinite(value)), None)
    if wrong is not None:
        raise Unusable(
            f"the log-probability of token {wrong} is {values[wrong]}: the weights hold NaN or overflow in the server's dtype, "
            "or it was started without log-probabilities"
        )
    return found
