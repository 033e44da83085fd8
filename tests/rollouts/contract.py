"""What the engine over HTTP takes for granted of vLLM: the same checks of a real server and of the one that stands for it in the tests."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MOST = 512
"""Tokens of prompt and answer that the server takes."""
MAX_RANK = 8
TOKEN = "secret"
DRAWING = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
ENDS: dict[str, Any] = {"max_tokens": 4, "seed": 5, "stop_token_ids": [1], "ignore_eos": True, "logprobs": 0, **DRAWING}


@dataclass(frozen=True)
class Told:
    status: int
    body: Any


@dataclass(frozen=True)
class Served:
    """A server of a base model under the names `first` and `second`. adapter, wide: folders of adapters, one of a rank beyond MAX_RANK."""

    url: str
    adapter: Path | None = None
    wide: Path | None = None
    token: str = TOKEN

    def ask(self, route: str, body: Mapping[str, Any] | None = None, *, token: str | None = None) -> Told:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.token if token is None else token}"}
        data = None if body is None else json.dumps(body).encode()
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + route, data=data, headers=headers), timeout=120) as answer:
                return Told(answer.status, _parsed(answer.read()))
        except urllib.error.HTTPError as refused:
            return Told(refused.code, _parsed(refused.read()))

    def completion(self, prompt: list[int], **settings: Any) -> Told:
        fixed = {"n": 1, "stream": False, "return_tokens_as_token_ids": True, "skip_special_tokens": False}
        return self.ask("/v1/completions", {"model": "first", "prompt": prompt, **fixed, **ENDS, **settings})

    def tokens(self, prompt: list[int], model: str = "first", **settings: Any) -> Told:
        drawn = {**ENDS, "detokenize": False, **settings}
        return self.ask("/inference/v1/generate", {"model": model, "token_ids": prompt, "sampling_params": drawn, "stream": False})


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text.decode()


def error(status: int, words: str, told: Told, param: str | None = None) -> None:
    """An error of vLLM's own form."""
    assert told.status == status, told
    assert told.body["error"].keys() == {"message", "type", "param", "code"}
    assert told.body["error"]["code"] == status and told.body["error"]["param"] == param
    assert words in told.body["error"]["message"]


# ---------------------------------------------------------------------- every server
def tokens_are_named_by_their_ids(server: Served) -> None:
    choice = server.completion([3, 4, 5]).body["choices"][0]
    assert len(choice["logprobs"]["tokens"]) == len(choice["logprobs"]["token_logprobs"]) == 4
    assert all(name.startswith("token_id:") for name in choice["logprobs"]["tokens"])
    plain = server.completion([3, 4, 5], return_tokens_as_token_ids=False).body["choices"][0]["logprobs"]["tokens"]
    assert not any(name.startswith("token_id:") for name in plain)


def ids_are_told_on_request(server: Served) -> None:
    choice = server.completion([3, 4, 5], return_token_ids=True).body["choices"][0]
    assert choice["prompt_token_ids"] == [3, 4, 5]
    assert [f"token_id:{i}" for i in choice["token_ids"]] == choice["logprobs"]["tokens"]
    assert server.completion([3, 4, 5]).body["choices"][0]["token_ids"] is None


def an_answer_says_the_first_name(server: Served) -> None:
    assert server.completion([3], model="second").body["model"] == "first"
    assert server.tokens([3], model="second").body["model"] == "first"
    error(404, "The model `third` does not exist", server.completion([3], model="third"), param="model")
    error(404, "The model `third` does not exist", server.tokens([3], model="third"), param="model")


def a_list_of_models_tells_their_length(server: Served) -> None:
    told = server.ask("/v1/models").body["data"]
    assert [(row["id"], row["parent"], row["max_model_len"]) for row in told[:2]] == [("first", None, MOST), ("second", None, MOST)]


def a_route_that_is_none_is_not_found(server: Served) -> None:
    assert server.ask("/areal_update_weights", {}) == Told(404, {"detail": "Not Found"})


def a_wrong_token_is_refused(server: Served) -> None:
    for route, body in (("/v1/models", None), ("/v1/completions", {}), ("/inference/v1/generate", {})):
        assert server.ask(route, body, token="wrong") == Told(401, {"error": "Unauthorized"})
    assert server.ask("/health", token="wrong").status == 200


def seeds_have_63_bits(server: Served) -> None:
    one, same = (server.completion([3, 4, 5], seed=2**63 - 1) for _ in range(2))
    assert one.status == 200 and one.body["choices"][0]["logprobs"] == same.body["choices"][0]["logprobs"]
    assert server.tokens([3, 4, 5], seed=2**63 - 1).status == 200
    error(400, str(2**63 - 1), server.completion([3, 4, 5], seed=2**63), param="body.seed")


def a_prompt_leaves_room_or_is_refused(server: Served) -> None:
    told = server.completion([3] * (MOST - 1))
    assert told.status == 200 and len(told.body["choices"][0]["logprobs"]["tokens"]) == 1, "cut without a word"
    assert len(server.tokens([3] * (MOST - 1)).body["choices"][0]["token_ids"]) == 1
    error(400, "max_tokens must be at least 1", server.completion([3] * MOST), param="max_tokens")
    error(400, f"max_model_len={MOST}", server.completion([3], max_tokens=MOST + 1), param="max_tokens")
    error(400, "Token id 99999 is out of vocabulary", server.completion([3, 99999]))
    error(400, "Token id 99999 is out of vocabulary", server.tokens([3, 99999]))


def both_routes_draw_the_same(server: Served) -> None:
    ours, theirs = server.completion([3, 4, 5]).body["choices"][0], server.tokens([3, 4, 5]).body["choices"][0]
    rows = theirs["logprobs"]["content"]
    assert [f"token_id:{row['token_id']}" for row in rows] == ours["logprobs"]["tokens"]
    assert [row["token_id"] for row in rows] == theirs["token_ids"] and theirs["finish_reason"] == ours["finish_reason"] == "length"
    assert max(abs(row["logprob"] - value) for row, value in zip(rows, ours["logprobs"]["token_logprobs"])) < 1e-5
    assert theirs["weight_versions"] == [{"version": "default", "start": 0, "end": 4}]


def both_routes_score_a_prompt(server: Served) -> None:
    ours = server.completion([3, 4, 5], max_tokens=1, temperature=0.0, logprobs=None, prompt_logprobs=1).body["choices"][0]
    theirs = server.tokens([3, 4, 5], max_tokens=1, temperature=0.0, logprobs=None, prompt_logprobs=1).body
    for rows in (ours["prompt_logprobs"], theirs["prompt_logprobs"]):
        assert rows[0] is None and rows[1]["4"]["logprob"] < 0 and rows[2]["5"]["logprob"] < 0
    assert abs(ours["prompt_logprobs"][1]["4"]["logprob"] - theirs["prompt_logprobs"][1]["4"]["logprob"]) < 1e-5


# ---------------------------------------------------------------------- adapters
def adapters_have_names(server: Served) -> None:
    load = {"lora_name": "one", "lora_path": str(server.adapter)}
    assert server.ask("/v1/load_lora_adapter", load) == Told(200, "Success: LoRA adapter 'one' added successfully.")
    error(400, "has already been loaded", server.ask("/v1/load_lora_adapter", load))
    row = server.ask("/v1/models").body["data"][-1]
    assert (row["id"], row["parent"], row["max_model_len"]) == ("one", "first", None)
    assert server.completion([3], model="one").body["model"] == server.tokens([3], model="one").body["model"] == "one"
    assert server.ask("/v1/unload_lora_adapter", {"lora_name": "one"}) == Told(200, "Success: LoRA adapter 'one' removed successfully.")
    error(404, "The lora adapter 'one' cannot be found", server.ask("/v1/unload_lora_adapter", {"lora_name": "one"}))
    error(404, "The model `one` does not exist", server.completion([3], model="one"), param="model")


def adapters_that_cannot_be_loaded_are_refused(server: Served) -> None:
    nowhere = {"lora_name": "two", "lora_path": "/nowhere"}
    error(404, "No adapter found for /nowhere", server.ask("/v1/load_lora_adapter", nowhere))
    wide = {"lora_name": "three", "lora_path": str(server.wide)}
    error(500, f"is greater than max_lora_rank {MAX_RANK}", server.ask("/v1/load_lora_adapter", wide))
    error(400, "Field required", server.ask("/v1/load_lora_adapter", {"lora_name": "four"}), param="body.lora_path")


# ---------------------------------------------------------------------- VLLM_SERVER_DEV_MODE=1
def a_version_of_weights_is_told_with_each_answer(server: Served) -> None:
    assert server.ask("/update_weight_version", {"new_version": "v7"}) == Told(200, {"success": True, "new_version": "v7"})
    assert server.ask("/weight_info") == Told(200, {"weight_version": "v7"})
    choice = server.tokens([3]).body["choices"][0]
    assert choice["weight_versions"] == [{"version": "v7", "start": 0, "end": len(choice["token_ids"])}]
    server.ask("/update_weight_version", {"new_version": "default"})


def a_server_tells_its_settings(server: Served) -> None:
    told = server.ask("/server_info?config_format=json").body["vllm_config"]["model_config"]
    assert (told["dtype"], told["max_model_len"], told["logprobs_mode"]) == ("torch.float32", MOST, "processed_logprobs")


def routes_of_development_answer(server: Served) -> None:
    assert server.ask("/reset_prefix_cache", {}) == Told(200, {"success": True})
    assert server.ask("/reset_mm_cache", {}) == server.ask("/reset_encoder_cache", {}) == Told(200, "")
    assert server.ask("/pause", {}) == Told(200, {"status": "paused"}) and server.ask("/is_paused").body == {"is_paused": True}
    assert server.ask("/resume", {}) == Told(200, {"status": "resumed"}) and server.ask("/is_paused").body == {"is_paused": False}
    assert server.ask("/is_sleeping") == Told(200, {"is_sleeping": False})
    assert server.ask("/abort_requests", {}) == Told(200, {"status": "aborted", "aborted": 0})
    assert list(server.ask("/weight_checker", {"action": "checksum"}).body) == ["checksums"]
    error(400, "Missing 'method'", server.ask("/collective_rpc", {}))
    error(500, "Call to collective_rpc method failed", server.ask("/collective_rpc", {"method": "nothing"}))


def a_reset_takes_running_requests_with_it(server: Served) -> None:
    """They begin anew; without that the cache stays as it is while one runs."""
    told: list[Told] = []
    asking = threading.Thread(target=lambda: told.append(server.tokens([3, 4, 5], max_tokens=400, stop_token_ids=[])))
    asking.start()
    time.sleep(0.2)
    assert server.ask("/reset_prefix_cache", {}) == Told(200, {"success": False})
    assert server.ask("/reset_prefix_cache?reset_running_requests=true", {}) == Told(200, {"success": True})
    asking.join()
    assert told[0].status == 200 and len(told[0].body["choices"][0]["token_ids"]) == 400


def weights_that_cannot_be_read_end_the_engine(server: Served) -> None:
    """The last check: the server is well to look at, and cannot answer any more."""
    told = server.ask("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": "/nowhere"}})
    error(500, "Call to collective_rpc method failed", told)
    assert server.completion([3]).status == 500


Check = Callable[[Served], None]


def hold(check: Check, server: Served) -> None:
    """One check, of a server that is well before it."""
    assert server.ask("/health").status == 200
    check(server)


EVERY: list[Check] = [
    tokens_are_named_by_their_ids,
    ids_are_told_on_request,
    an_answer_says_the_first_name,
    a_list_of_models_tells_their_length,
    a_route_that_is_none_is_not_found,
    a_wrong_token_is_refused,
    seeds_have_63_bits,
    a_prompt_leaves_room_or_is_refused,
    both_routes_draw_the_same,
    both_routes_score_a_prompt,
]
ADAPTERS: list[Check] = [adapters_have_names, adapters_that_cannot_be_loaded_are_refused]
WHOLE: list[Check] = [
    a_version_of_weights_is_told_with_each_answer,
    a_server_tells_its_settings,
    routes_of_development_answer,
    a_reset_takes_running_requests_with_it,
]
LAST: list[Check] = [weights_that_cannot_be_read_end_the_engine]
