"""The reward services of DeepGen-RL by their names, variables and ports, over JSON and raw pixels; no pickle is read or written."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Literal, NamedTuple

from lit_rl.errors import ConfigError
from lit_rl.rewards.client import HTTPReward
from lit_rl.rewards.quoted_text import check_quoted
from lit_rl.types import Info

Name = Literal["aesthetic", "image_reward", "ocr", "pickscore", "deqa", "unifiedreward_sglang", "hps"]


class Service(NamedTuple):
    """A port on this machine, and the name of the score at the server."""

    port: int
    score: str


SERVICES: dict[str, Service] = {
    "aesthetic": Service(18080, "aesthetic"),
    "image_reward": Service(18081, "image_reward"),
    "ocr": Service(18082, "ocr"),
    "pickscore": Service(18083, "pick_score"),
    "deqa": Service(18084, "deqa"),
    "unifiedreward_sglang": Service(18086, "unifiedreward_sglang"),
    "hps": Service(18090, "hps"),  # 18087 is the judge's
}


class ServiceReward(HTTPReward):
    """A score of the reward service of this name, asked as `lit_rl.rewards.client.HTTPReward` asks: POST /v1/score_batch.

    `python -m lit_rl.rewards.server --port 18082 --scorers quoted` serves `ocr`, `--port 18083 --scorers pickscore` serves `pickscore`; a
    reward class of yours serves any other. DeepGen-RL's own services answer with pickled objects, which run whatever code their sender
    wishes: they are not asked.

    Args:
        service: Name of the service, and of the score here.
        urls: As of `HTTPReward`. Default: $NAME_URL, e.g. $OCR_URL, else the service's port on this machine: aesthetic 18080,
            image_reward 18081, ocr 18082, pickscore 18083, deqa 18084, unifiedreward_sglang 18086, hps 18090.
        score: Name of the score at the server. Default: that of the service.
        samples_per_request, concurrency, timeout_s, deadline_s, token_env: See `HTTPReward`.
    """

    def __init__(
        self,
        service: Name,
        *,
        urls: str | list[str] | None = None,
        score: str | None = None,
        samples_per_request: int = 8,
        concurrency: int = 4,
        timeout_s: float = 60.0,
        deadline_s: float = 300.0,
        token_env: str = "REWARD_TOKEN",
    ) -> None:
        if service not in SERVICES:
            raise ConfigError(f"service={service!r}: choose one of {', '.join(SERVICES)}, or ask a server of yours with HTTPReward")
        known, variable = SERVICES[service], f"{service.upper()}_URL"
        try:
            super().__init__(
                urls or os.environ.get(variable, "").strip(" \t\r\n,") or f"localhost:{known.port}",
                {service: score or known.score},
                samples_per_request=samples_per_request,
                concurrency=concurrency,
                timeout_s=timeout_s,
                deadline_s=deadline_s,
                token_env=token_env,
            )
        except ConfigError as error:
            if urls or "urls" not in str(error):
                raise
            raise ConfigError(f"{variable} in the environment: {error}") from error

    def check(self, rows: Iterable[Info]) -> None:
        """Raises ConfigError for prompts without a quoted text, where OCR is asked."""
        if "ocr" in (self.outputs if self.counted is None else self.counted):
            check_quoted(rows)
