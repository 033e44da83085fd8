"""SGLang: POST /generate, token ids both ways."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lit_rl.rollouts.base import Sampling
from lit_rl.rollouts.dialects import Answer, Asked, Body, Dialect, Unreadable, answer_of, drawing, numbers


class SGLang(Dialect):
    """POST /generate with input_ids. Adapters are named in `lora_path`. Seeds count where the server samples deterministically.

    A prompt with pictures has one place for each of them, and these in `image_data`; SGLang from 0.5.13 on tells the ids as it read them.
    """

    def ask(self, asked: Asked, sampling: Sampling, *, seed: int, stops: Sequence[int], model: str) -> tuple[str, Body]:
        drawn = {
            "max_new_tokens": sampling.max_new_tokens,
            "sampling_seed": seed,
            "stop_token_ids": list(stops),
            **drawing(sampling, asked.banned),
        }
        return self._generate(asked, model, {**drawn, "skip_special_tokens": False})

    def read(self, body: object) -> Answer:
        meta = _meta(body)
        finish = meta.get("finish_reason")
        pairs = _pairs(meta, "output_token_logprobs")
        version = meta.get("weight_version")
        reason = finish.get("type") if isinstance(finish, Mapping) else finish
        versions = [] if version is None else [str(version)]
        ids, logprobs = [int(pair[1]) for pair in pairs], [pair[0] for pair in pairs]
        return answer_of(ids, logprobs, reason, versions=versions, prompt=self.prompt_of(body))

    def logprobs(self, asked: Asked, *, first: int, model: str) -> tuple[str, Body]:
        return self._generate(asked, model, {"max_new_tokens": 1, "temperature": 0.0}, logprob_start_len=first - 1)

    def read_logprobs(self, body: object, ids: Sequence[int], *, first: int) -> list[float]:
        """The first pair is of the token before them and has no number. Places of pictures, which come before, have other ids in SGLang."""
        pairs = _pairs(_meta(body), "input_token_logprobs")
        wanted = list(ids[first:])
        if not wanted or len(pairs) != len(wanted) + 1 or [pair[1] for pair in pairs[1:]] != wanted:
            raise Unreadable("its input_token_logprobs are not of the prompt's tokens")
        return numbers([pair[0] for pair in pairs[1:]])

    def load_adapter(self, name: str, folder: str) -> tuple[str, Body]:
        return "/load_lora_adapter", {"lora_name": name, "lora_path": folder}

    def unload_adapter(self, name: str) -> tuple[str, Body]:
        return "/unload_lora_adapter", {"lora_name": name}

    def load_weights(self, name: str, folder: str) -> list[tuple[str, Body]]:
        return [("/update_weights_from_disk", {"model_path": folder, "weight_version": name, "abort_all_requests": True})]

    def _generate(self, asked: Asked, model: str, sampling: Body, **settings: object) -> tuple[str, Body]:
        adapter = {"lora_path": model} if model else {}
        seen: Body = {"image_data": list(asked.pictures), "return_prompt_token_ids": True} if asked.pictures else {}
        body = {"input_ids": list(asked.prompt), "sampling_params": sampling, "return_logprob": True, "stream": False}
        return "/generate", {**body, **adapter, **seen, **settings}


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
