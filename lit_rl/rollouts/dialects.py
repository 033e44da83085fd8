"""Requests to inference servers and their answers, token ids both ways: what `vllm.py` and `sglang.py` have in common."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lit_rl.rollouts.base import Sampling

Body = Mapping[str, object]


class Unreadable(Exception):
    """The server's answer does not fit the request. The message says what is wrong with it."""


class Unusable(Exception):
    """The server understood and its answer is of no use: asking again would not help."""


@dataclass(frozen=True)
class Asked:
    """A prompt with one place for each of its pictures, these as `data:` URLs, and tokens that the answer must not hold.

    chat: A prompt with pictures as the fields of a chat request, `messages` among them.
    """

    prompt: Sequence[int]
    pictures: Sequence[str] = ()
    banned: Sequence[int] = ()
    chat: Body = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """Tokens and their log-probabilities. finish: stop, length or abort.

    model: The name that answered; versions: those of the whole weights that drew the tokens, in order; prompt: its ids as the server
    read it, with all places of its pictures; each where the server tells.
    """

    ids: list[int]
    logprobs: list[float]
    finish: str
    model: str | None = None
    versions: Sequence[str] = ()
    prompt: Sequence[int] | None = None


class Dialect(ABC):
    """Requests as (route, body), answers from parsed JSON; knows no connection."""

    tells_models = False
    """True when requests name a model, out of those that `GET /v1/models` lists."""

    version_route: str | None = None
    """Where a server tells the version of its whole weights, if their answers do not."""

    settings_route: str | None = None
    """The route by which a server may tell its settings, the dtype among them."""

    @abstractmethod
    def ask(self, asked: Asked, sampling: Sampling, *, seed: int, stops: Sequence[int], model: str) -> tuple[str, Body]:
        """One answer. model: the name it is served under; of the adapter where one answers."""

    @abstractmethod
    def read(self, body: object) -> Answer:
        """Raises Unreadable, Unusable."""

    @abstractmethod
    def logprobs(self, asked: Asked, *, first: int, model: str) -> tuple[str, Body]:
        """Log-probabilities of a prompt's tokens, those from the one on that is number `first` among them at least."""

    @abstractmethod
    def read_logprobs(self, body: object, ids: Sequence[int], *, first: int) -> list[float]:
        """Those of `ids[first:]`, at temperature 1. ids: Of the prompt with all places of pictures. Raises Unreadable, Unusable."""

    def prompt_of(self, body: object) -> list[int] | None:
        """The ids of a prompt with pictures as the server read it, with all their places; None where it does not tell."""
        told = body.get("prompt_token_ids") if isinstance(body, Mapping) else None
        return told if isinstance(told, list) else None

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
    told = text_of(body, "weight_version")
    if told is None:
        raise Unreadable("it tells no `weight_version`")
    return told


def served_dtype(body: object) -> str | None:
    """The dtype of the model in the answer to `GET /server_info?config_format=json`; None where it does not say."""
    for name in ("vllm_config", "model_config"):
        body = body.get(name) if isinstance(body, Mapping) else None
    told = text_of(body, "dtype")
    return None if told is None else told.removeprefix("torch.")


def drawing(sampling: Sampling, banned: Sequence[int] = ()) -> dict[str, object]:
    """Everything that shapes the distribution, said out loud: what is left out comes from the model's generation_config."""
    shape = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k or -1}
    bias = {"logit_bias": {str(token): -100.0 for token in banned}} if banned else {}
    return {**shape, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, **bias}


def choice_of(body: object) -> Mapping[str, object]:
    """The one answer in `choices`. Raises Unreadable."""
    choices = body.get("choices") if isinstance(body, Mapping) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], Mapping):
        raise Unreadable("it has no `choices` with one answer")
    return choices[0]


def text_of(body: object, name: str) -> str | None:
    """A field as text; None where there is none."""
    value = body.get(name) if isinstance(body, Mapping) else None
    return None if value is None else str(value)


def answer_of(
    ids: Sequence[int],
    logprobs: object,
    finish: object,
    *,
    model: str | None = None,
    versions: Sequence[str] = (),
    prompt: Sequence[int] | None = None,
) -> Answer:
    """An answer whose parts fit together. Raises Unreadable, Unusable."""
    if finish == "abort":
        return Answer([], [], "abort", model, versions, prompt)  # what there was of it is drawn again
    if finish not in ("stop", "length"):
        raise Unreadable(f"it ends for the reason {finish!r}")
    if not isinstance(logprobs, list) or len(logprobs) != len(ids):
        raise Unreadable(f"it has {len(ids)} tokens and not as many log-probabilities")
    if not ids:
        raise Unreadable("it has no token")
    return Answer(list(ids), numbers(logprobs), finish, model, versions, prompt)


def numbers(values: Sequence[object]) -> list[float]:
    """Raises Unusable where one is missing or not finite."""
    found = [float(value) if isinstance(value, int | float) else math.nan for value in values]
    wrong = next((i for i, value in enumerate(found) if not math.isfinite(value)), None)
    if wrong is not None:
        raise Unusable(
            f"the log-probability of token {wrong} is {values[wrong]}: the weights hold NaN or overflow in the server's dtype, "
            "or it was started without log-probabilities"
        )
    return found
