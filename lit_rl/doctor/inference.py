"""Servers that answer for a run's policy, such as vLLM: whether they do."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterator

from jsonargparse import Namespace

from lit_rl.command_line.dotted import imported_class
from lit_rl.doctor.report import Finding, ok, problem
from lit_rl.errors import ConfigError
from lit_rl.net.addresses import parse_urls
from lit_rl.rollouts.http import URL, HTTPEngine

ANSWER_SECONDS = 5.0
CURE = (
    "start it (scripts/run_vllm_base.sh, or docker-compose -f docker/docker-compose.areal.yml up -d vllm), see with nvidia-smi that its "
    "GPUs are free and with `ss -tln` that nothing else listens at its port, read its log (docker logs vllm-cua-areal), or name another by "
    "VLLM_API_BASE"
)


def servers(config: Namespace) -> Iterator[Finding]:
    """A finding for each inference server of a run; none where the training processes answer themselves."""
    answers = config.model.init_args.get("answers")
    engine = answers.get("engine") if answers else None
    if engine is None or not issubclass(imported_class(engine.class_path) or object, HTTPEngine):
        return
    try:
        urls = parse_urls(engine.init_args.urls or URL)
    except ConfigError as error:
        yield problem("answers", str(error))
        return
    yield from (_asked(url.removesuffix("/v1")) for url in urls)


def _asked(url: str) -> Finding:
    about, opener = f"inference server {url}", urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url}/health", timeout=ANSWER_SECONDS):
            return ok(about, "ready")
    except urllib.error.HTTPError as error:
        return problem(about, f"GET /health answers {error.code}; it is still loading, or its engine has died: {CURE}")
    except OSError as error:
        return problem(about, f"it does not answer ({getattr(error, 'reason', error)}): {CURE}")
