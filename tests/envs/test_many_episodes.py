"""Over many episodes, lost worlds among them, a process keeps its memory and its file handles."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc

import psutil
import pytest
from fake_gbox import TOKEN, FakeGBox
from test_gbox import TASK, solve

from benchmarks.worlds import KINDS, episodes
from lit_rl.envs.base import World
from lit_rl.envs.gbox import GBoxes


def test_many_episodes_of_the_tiny_desktop_leave_nothing() -> None:
    kind = KINDS["tiny_desktop"]

    async def run() -> list[int]:
        held = []
        async with kind.worlds() as worlds:
            for seeds in (range(10), range(100)):
                assert await episodes(kind, worlds, seeds, 4) == len(seeds)
                gc.collect()
                held.append(tracemalloc.get_traced_memory()[0])
        return held

    tracemalloc.start()
    try:
        few, many = asyncio.run(run())
    finally:
        tracemalloc.stop()
    assert many - few < 200_000


def test_boxes_that_are_lost_leave_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GBOX_API_KEY", TOKEN)
    fake = FakeGBox()

    async def episode(world: World, attempt: int) -> None:
        await world.reset(TASK, 0)
        fake.faults += [("/actions/click", "drop")] * (attempt == 0)
        await solve(fake, world)

    async def run() -> list[int]:
        handles = []
        await fake.server.start_server()
        async with GBoxes(base_url=fake.url) as worlds:
            for count in (3, 20):
                for _ in range(count):
                    await worlds.attempts(episode)
                handles.append(psutil.Process().num_fds())
        await fake.server.close()
        assert worlds.counts == {"opened": 46, "closed": 46, "leaked": 0} and not fake.running
        return handles

    few, many = asyncio.run(run())
    assert many - few < 10  # of forty
