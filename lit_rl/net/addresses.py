"""Addresses of servers, the servers of a rank, and the check that reward servers answer."""

from __future__ import annotations

import difflib
import http.client
import ipaddress
import json
import logging
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence

from lit_rl.errors import ConfigError

log = logging.getLogger(__name__)
HEALTH_SECONDS = 5.0
"""For one answer to GET /health."""


def parse_urls(urls: str | Sequence[str]) -> list[str]:
    """`host:port`, `http(s)://host:port[/score]`, ranges `host:8000-8003`, comma lists of them -> base URLs without a trailing slash.

    An IPv6 address that a port follows stands in brackets.
    """
    found = []
    for url in (part.strip() for given in ([urls] if isinstance(urls, str) else urls) for part in given.strip(" \t\r\n,").split(",")):
        match = re.fullmatch(r"(?:(https?)://)?([^/:\s]+|\[[0-9a-fA-F:.]+\])(?::(\d{1,6})(?:-(\d{1,6}))?)?(/\S*)?", _bracketed(url))
        if match is None:
            hint = "; write an IPv6 address as [::1]:8000" if url.count(":") > 2 else ""
            raise ConfigError(f"urls: {url!r} is not http(s)://host:port, host:port or host:first-last{hint}")
        scheme, host, first, last, path = match.groups()
        path = re.sub(r"/(score|v1/score_batch)$", "", (path or "").rstrip("/"))
        ports = [f":{p}" for p in range(int(first), int(last or first) + 1)] if first else [""]
        if not ports:
            raise ConfigError(f"urls: {url!r} ends its range of ports before its start")
        if first and not 1 <= int(first) <= int(last or first) <= 65535:
            raise ConfigError(f"urls: {url!r}: ports are 1 to 65535")
        found += [f"{scheme or 'http'}://{host}{port}{path}" for port in ports]
    if not found:
        raise ConfigError("urls is empty; give at least one server, e.g. urls: 127.0.0.1:8000")
    return found


def urls_from_environment(world_size: int) -> list[str]:
    """$REWARD_SERVER_URLS (a comma list); else one port per process, $REWARD_SERVER_HOST:$REWARD_SERVER_PORT (127.0.0.1:8000) and up."""
    if listed := _variable("REWARD_SERVER_URLS"):
        return listed.split(",")
    host = _variable("REWARD_SERVER_HOST") or "127.0.0.1"
    port = _variable("REWARD_SERVER_PORT") or "8000"
    if "," in host:
        raise ConfigError(
            f"REWARD_SERVER_HOST={host} in the environment names several hosts; list them with their ports in REWARD_SERVER_URLS"
        )
    if re.search(r"[/?#@\s]|[^:]:\d*$", _bracketed(host.rstrip("/")).rpartition("://")[2]):
        raise ConfigError(
            f"REWARD_SERVER_HOST={host} in the environment is more than a host; give the port by REWARD_SERVER_PORT, or whole addresses by "
            "REWARD_SERVER_URLS"
        )
    if not (port.isascii() and port.isdecimal()):
        raise ConfigError(f"REWARD_SERVER_PORT={port} in the environment is not a number; it is the port of the first server")
    if not 1 <= int(port) <= 65536 - world_size:
        raise ConfigError(
            f"REWARD_SERVER_PORT={port} in the environment is not a port; it is that of the first server, and each of the "
            f"{world_size} processes asks the next one"
        )
    return [f"{_bracketed(host.rstrip('/'))}:{int(port) + i}" for i in range(world_size)]


def token_from_environment(variable: str) -> str | None:
    """The bearer token that a variable of the environment holds, without white space around it. Raises ConfigError for what is none."""
    token = os.environ.get(variable, "").strip()
    if not all("!" <= letter <= "~" for letter in token):
        raise ConfigError(f"{variable} in the environment is no token: it holds white space, or letters other than those of ASCII")
    return token or None


def _variable(name: str) -> str:
    """A variable of the environment without spaces and commas around it."""
    return os.environ.get(name, "").strip(" \t\r\n,")


def _bracketed(host: str) -> str:
    """An IPv6 address in brackets; anything else as it is."""
    scheme, separator, rest = host.rpartition("://")
    try:
        ipaddress.IPv6Address(rest)
    except ValueError:
        return host
    return f"{scheme}{separator}[{rest}]"


def servers_of_rank(urls: Sequence[str], *, rank: int, world_size: int, mapping: str) -> list[str]:
    """The servers that `rank` asks, in turn where they are several.

    rank: url `rank % n`, so rank i has server i when the counts match and fewer servers are shared evenly; more servers than ranks raise.
    round_robin: all of them, starting at its own. auto: as `rank`, and with more servers than ranks each rank asks every
    `world_size`-th, so that none is idle.
    """
    if mapping == "round_robin":
        start = rank % len(urls)
        return [*urls[start:], *urls[:start]]
    if len(urls) <= world_size:
        return [urls[rank % len(urls)]]
    if mapping == "rank":
        raise ConfigError(
            f"mapping=rank with {len(urls)} servers for {world_size} ranks leaves {len(urls) - world_size} idle; "
            "give at most one url per rank, or set mapping: auto"
        )
    return list(urls[rank::world_size])


def check_health(url: str, *, headers: Mapping[str, str], patience_s: float) -> Mapping[str, object]:
    """The answer of the server at `url` to GET /health once it has loaded; {} without that route. Raises ConfigError when none answers."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _StayHere())
    until, status, body = time.monotonic() + patience_s, 0, b""
    while status != 200:
        try:
            with opener.open(urllib.request.Request(f"{url}/health", headers=dict(headers)), timeout=HEALTH_SECONDS) as response:
                status, body = response.status, _read_within(response, url, seconds=HEALTH_SECONDS)
        except urllib.error.HTTPError as error:
            status = error.code
        except http.client.HTTPException as error:
            raise ConfigError(f"what listens at {url} does not speak HTTP ({type(error).__name__}); correct `urls`") from error
        except OSError as error:
            port = re.search(r":(\d+)(/|$)", url)
            raise ConfigError(
                f"no reward server answers at {url} ({getattr(error, 'reason', error)}); start one with `python -m lit_rl.rewards.server "
                f"--port {port[1] if port else 80}`, correct `urls`, or set DISABLE_RL_REWARD_MODEL=true to train on pseudo scores"
            ) from error
        if status in (404, 405):
            return {}
        if status not in (200, 503):
            raise ConfigError(
                f"reward server {url} answers GET /health with status {status}; is something else listening on that port, such as the "
                "platform? Start the reward server on another one, e.g. --port 8004, and name it in `urls` or REWARD_SERVER_URLS"
            )
        if status == 503 and time.monotonic() >= until:
            raise ConfigError(
                f"reward server {url} is still loading or draining after {patience_s:g} s; look at its log or raise deadline_s"
            )
        if status == 503:
            log.info("reward server %s is loading; waiting", url)
            time.sleep(0.5)
    try:
        answer = json.loads(body)
    except ValueError:  # a server with a /health of its own kind
        return {}
    return answer if isinstance(answer, dict) else {}


def _read_within(response: http.client.HTTPResponse, url: str, *, seconds: float) -> bytes:
    """The first MiB of an answer. Raises ConfigError where it takes longer: a socket's own timeout begins anew with each byte."""
    body, end = b"", time.monotonic() + seconds
    while len(body) < 1 << 20 and (piece := response.read1(1 << 16)):
        body += piece
        if time.monotonic() > end:
            raise ConfigError(f"reward server {url} does not finish its answer to GET /health in {seconds:g} s; look at its log")
    return body


class _StayHere(urllib.request.HTTPRedirectHandler):
    """Takes a redirect for an answer: followed, it would carry the token to whoever it names."""

    def redirect_request(self, *args: object, **kwargs: object) -> None:
        return None


def check_outputs(url: str, wanted: Sequence[str], health: Mapping[str, object]) -> None:
    """Raises ConfigError when the server says which scores it gives, and one of `wanted` is not among them.

    Older servers do not say: scoring a test image at every start would cost a VLM seconds, so theirs are compared at the first scoring.
    """
    known = health.get("outputs")
    if isinstance(known, list) and (missing := [name for name in wanted if name not in known]):
        near = [match for name in missing for match in difflib.get_close_matches(name, known, n=1)]
        meant = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"reward server {url} gives the scores {', '.join(known)}, not {', '.join(missing)}{meant or '.'} "
            "Set HTTPReward's `outputs` to scores that it gives, or start it with the scorers that give them (--scorers)"
        )
