"""Before a run: does every judge answer, and does it serve the model that will be asked?"""

from __future__ import annotations

import json
from collections.abc import Sequence

from lit_rl.errors import ConfigError
from lit_rl.net.retry import NoAnswer, exchange, open_session

SECONDS = 5.0
MODELS = "/v1/models"


async def check_served(urls: Sequence[str], *, model: str, token_env: str, variable: str) -> None:
    """Ask each server for its models. Raises ConfigError that names the server, what it serves, and the remedy."""
    import aiohttp

    async with open_session(token_env=token_env, connector=aiohttp.TCPConnector()) as session:
        for url in urls:
            try:
                status, answer, _ = await exchange(
                    session, url + MODELS, name=f"judge {url}", seconds=SECONDS, limit=1 << 20, body=None, headers={}
                )
            except NoAnswer as error:
                raise ConfigError(
                    f"{error}: start one, e.g. `vllm serve FOLDER --served-model-name {model}`, or set judge.urls or ${variable}"
                ) from error
            _check(url, status, answer, model=model, token_env=token_env)


def _check(url: str, status: int, answer: bytes, *, model: str, token_env: str) -> None:
    if status in (401, 403):
        raise ConfigError(f"judge {url} answers GET {MODELS} with status {status}: set ${token_env} to its API key")
    if status != 200:
        raise ConfigError(f"judge {url} answers GET {MODELS} with status {status}; is something else listening on that port?")
    try:
        names = [str(served["id"]) for served in json.loads(answer)["data"]]
    except (ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"judge {url} answers GET {MODELS} with no list of models; is something else listening on that port?") from error
    if model not in names:
        raise ConfigError(f"judge {url} serves {', '.join(names) or 'no model'}, not {model}: set judge.model, or its --served-model-name")
