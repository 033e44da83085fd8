"""The contract of worlds: a class of tests that runs on every kind. A subclass says how to make the worlds and how to solve the task."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from lit_rl.envs.actions import Action, ActionError
from lit_rl.envs.base import Observation, Outcome, World, Worlds
from lit_rl.envs.failures import Status, WorldError
from lit_rl.envs.tasks import Task


class Supply(NamedTuple):
    runner: asyncio.Runner
    worlds: Worlds


class Episode(NamedTuple):
    instruction: str
    first: Observation
    outcome: Outcome


class WorldContract:
    task: Task
    seeds = (1, 2, 3)
    """Seeds of which at least two differ, at the start or in what the evaluator tells."""

    def make(self) -> Worlds:
        raise NotImplementedError

    async def prepare(self) -> None:
        """Start what the worlds need from outside, before `make`."""

    async def finish(self) -> None:
        """End it, and see that nothing is left of the worlds there."""

    async def solve(self, world: World) -> None:
        """Do the task, by whatever means the world's screen and vocabulary offer."""
        for _ in range(30):
            if (await world.screenshot()).ended:
                return
            await world.execute(world.oracle())  # type: ignore[attr-defined]  # worlds that know the answer

    @pytest.fixture(scope="class")
    def supply(self) -> Iterator[Supply]:
        """One start for all tests of a class; at the end nothing is left open."""
        with asyncio.Runner() as runner:
            runner.run(self.prepare())
            worlds = self.make()
            runner.run(worlds.start())
            yield Supply(runner, worlds)
            runner.run(worlds.stop())
            runner.run(worlds.stop())
            runner.run(self.finish())
            assert worlds.counts["opened"] == worlds.counts["closed"] and not worlds.counts["leaked"]

    async def episode(self, worlds: Worlds, seed: int, *, solve: bool = True) -> Episode:
        async with worlds.world() as world:
            instruction = await world.reset(self.task, seed)
            first = await world.screenshot()
            if solve:
                await self.solve(world)
            return Episode(instruction, first, await world.evaluate())

    def test_the_task_is_accepted_and_told(self, supply: Supply) -> None:
        supply.worlds.check(self.task)
        instruction, first, outcome = supply.runner.run(self.episode(supply.worlds, 1, solve=False))
        assert instruction and (first.image is not None or first.text) and not first.ended
        assert not outcome.success and outcome.reward == 0 and outcome.status is Status.FAILURE

    def test_who_can_do_it_succeeds_also_beside_others_and_the_next_begins_anew(self, supply: Supply) -> None:
        async def together() -> list[Episode]:
            return await asyncio.gather(*[self.episode(supply.worlds, seed) for seed in self.seeds])

        one_by_one = [supply.runner.run(self.episode(supply.worlds, seed)) for seed in self.seeds]
        for alone, beside in zip(one_by_one, supply.runner.run(together()), strict=True):
            assert alone.outcome.success and alone.outcome.reward == 1
            assert beside.outcome.success and (alone.instruction, alone.first.key) == (beside.instruction, beside.first.key)
        assert len({(episode.instruction, episode.first.key, str(episode.outcome.details)) for episode in one_by_one}) > 1
        assert not supply.runner.run(self.episode(supply.worlds, self.seeds[0], solve=False)).outcome.success

    def test_saying_that_it_is_done_does_not_do_it(self, supply: Supply) -> None:
        async def claim() -> tuple[Outcome, Observation]:
            async with supply.worlds.world() as world:
                await world.reset(self.task, 1)
                await world.execute(Action(kind="done", text="I did it"))
                last = await world.screenshot()
                with pytest.raises(ActionError, match="ended"):
                    await world.execute(Action(kind="fail"))
                return await world.evaluate(), last

        outcome, last = supply.runner.run(claim())
        assert not outcome.success and last.ended

    def test_the_policy_is_told_what_cannot_be_and_goes_on(self, supply: Supply) -> None:
        async def tried() -> Outcome:
            async with supply.worlds.world() as world:
                await world.reset(self.task, 1)
                seen = await world.screenshot()
                if seen.image is not None and "click" in world.kinds:
                    with pytest.raises(ActionError, match="outside"):
                        await world.execute(Action(kind="click", x=seen.image.width, y=0))
                for kind in {"button", "open", "click", "key"} - world.kinds:
                    with pytest.raises(ActionError, match=f"{kind} is not an action here"):
                        await world.execute(Action(kind=kind, text="a", keys=("a",), x=0, y=0))
                await self.solve(world)
                return await world.evaluate()

        assert supply.runner.run(tried()).success

    def test_a_hung_world_ends_within_its_limit_and_a_fresh_one_takes_over(self, supply: Supply, monkeypatch: pytest.MonkeyPatch) -> None:
        async def hang(*_: object) -> Observation:
            await asyncio.Event().wait()
            raise AssertionError

        async def attempt(world: World, number: int) -> int:
            await world.reset(self.task, 1)
            if number == 0:
                monkeypatch.setattr(world, "limits", type(world.limits)(screenshot=0.05))
                monkeypatch.setattr(world, "on_screenshot", hang)
            await world.screenshot()
            return number

        assert supply.runner.run(supply.worlds.attempts(attempt)) == 1
        with pytest.raises(WorldError, match=r"screenshot took longer than 0.05 s, which limits.screenshot allows") as caught:
            supply.runner.run(supply.worlds.attempts(lambda world, _: attempt(world, 0), retries=1))
        assert caught.value.status is Status.ENV_ERROR and not caught.value.status.counts

    def test_a_cancelled_episode_gives_its_world_back(self, supply: Supply) -> None:
        async def cancelled() -> None:
            async with supply.worlds.world() as world:
                await world.reset(self.task, 1)
                asyncio.current_task().cancel()  # type: ignore[union-attr]
                await asyncio.Event().wait()

        before = supply.worlds.counts["closed"]
        with pytest.raises(asyncio.CancelledError):
            supply.runner.run(cancelled())
        assert supply.worlds.counts["closed"] == before + 1
