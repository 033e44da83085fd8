"""Boxes of GBox as an agent's worlds: the key, and whether the service takes it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator

from jsonargparse import Namespace

from lit_rl.command_line.dotted import imported_class
from lit_rl.doctor.report import Finding, ok, problem
from lit_rl.envs.failures import WorldError
from lit_rl.envs.gbox import OWNER, GBoxes
from lit_rl.envs.gbox_client import BASE_URL, DEFAULT_URL, GBoxClient, check_key
from lit_rl.errors import ConfigError

SERVICE_SECONDS = 15.0


def boxes(config: Namespace) -> Iterator[Finding]:
    """The finding about GBox's key and whether the service takes it, of a run whose worlds are boxes."""
    episodes = config.model.init_args.get("episodes")
    worlds = episodes.get("worlds") if episodes else None
    if worlds is None or not issubclass(imported_class(worlds.class_path) or object, GBoxes):
        return
    try:
        check_key()
        yield asyncio.run(_service(worlds.init_args.base_url or os.environ.get(BASE_URL, "").strip() or DEFAULT_URL))
    except ConfigError as error:
        yield problem("boxes", str(error))


async def _service(url: str) -> Finding:
    client = GBoxClient(url)
    await client.open()
    try:
        found = await client.running({OWNER: "1"}, SERVICE_SECONDS)
    except WorldError as error:
        return problem("boxes", f"{error}; set base_url or {BASE_URL}, and see that the service runs")
    finally:
        await client.close()
    return ok("boxes", f"{url} takes the key; boxes of runs that are up or were left: {len(found)}")
