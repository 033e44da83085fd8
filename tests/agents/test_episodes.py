"""Episodes: who ends them and why, what a prompt shows, how single requests are answered together, and whose fault a failure is."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_rl.agents.codecs import Compact
from lit_rl.agents.demonstrations import demonstrate, write_rows
from lit_rl.agents.episodes import Manner, Trajectory
from lit_rl.agents.numbers import trajectory_metrics
from lit_rl.agents.play import Episodes, Job, jobs_of
from lit_rl.agents.rows import rollout_of
from lit_rl.envs.actions import Action
from lit_rl.envs.base import Observation, Outcome, World, Worlds
from lit_rl.envs.failures import Limits, Status, WorldError
from lit_rl.envs.tasks import Task
from lit_rl.envs.tiny_desktop import TinyDesktops
from lit_rl.errors import ConfigError
from lit_rl.miniatures.vlm import build_vlm
from lit_rl.policies.vision_language import VisionLanguageModel
from lit_rl.rollouts.base import Request, RolloutEngine, RolloutError, Sample, Sampling

SOLVED = {"command": "desktop get solved", "equals": "1"}
BUTTONS = Task(id="b", params={"program": "buttons", "hits": 2, "grid": 2}, evaluator=SOLVED, max_turns=4, seed=3)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> VisionLanguageModel:
    """Its tokenizer and image processor alone are asked."""
    folder = tmp_path_factory.mktemp("vlm")
    return VisionLanguageModel(str(build_vlm(folder, family="qwen3_vl", hidden=32, vision_hidden=32, max_side=96)))


class Scripted(RolloutEngine):
    """Answers by `say(key)`, key = (seed, "episode", place..., group, number, attempt, turn); `batches` has what was asked together."""

    def __init__(self, policy: VisionLanguageModel, say: Callable[[tuple[Any, ...]], str]) -> None:
        self.policy, self.say = policy, say
        self.batches: list[list[tuple[Any, ...]]] = []

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Sample]:
        self.batches.append([request.key for request in requests])
        ids = [[*self.policy.encode(self.say(request.key)), self.policy.stop_ids[0]] for request in requests]
        return [Sample(row, [-0.5] * len(row), "stop") for row in ids]


def play(
    policy: VisionLanguageModel,
    say: Callable[[tuple[Any, ...]], str],
    *,
    worlds: Worlds | None = None,
    tasks: Sequence[tuple[Task, int, int]] = ((BUTTONS, 0, 0),),
    manner: Manner | None = None,
    **settings: Any,
) -> tuple[list[Trajectory], Scripted]:
    episodes = Episodes(
        worlds=worlds or TinyDesktops(size=64), codec=Compact("bins:2", prompt=False), manner=manner or Manner(), **settings
    )
    engine = Scripted(policy, say)
    try:
        return episodes.play(policy, engine, Sampling(), jobs_of(tasks, seed=0, place=("train", 0))), engine
    finally:
        episodes.close()
        counts = episodes.worlds.counts
        assert counts["opened"] == counts["closed"] and not counts["leaked"]


# ---------------------------------------------------------------------- how episodes end
def test_an_oracle_succeeds_and_its_turns_are_rows_to_learn_from(policy: VisionLanguageModel, tmp_path: Path) -> None:
    episodes = Episodes(worlds=TinyDesktops(size=64), codec=Compact("bins:2", prompt=False))
    try:
        found = demonstrate(policy, episodes, [BUTTONS, BUTTONS])
    finally:
        episodes.close()
    assert [t.status for t in found] == [Status.SUCCESS] * 2 and [len(t.turns) for t in found] == [2, 2] and found[0].reward == 1
    assert write_rows(found, tmp_path / "rows.jsonl") == 4
    from datamodules.supervised import SupervisedText

    data = SupervisedText(train=str(tmp_path / "rows.jsonl"))
    assert len(data.train_prompts) == 4 and len(data.train_prompts[0]["images"]) == 1


@pytest.mark.parametrize(
    ("say", "manner", "status", "turns"),
    [
        ("nonsense", Manner(max_parse_errors=3), Status.PARSE_ERROR, 3),
        ("click 0 0", Manner(max_repeats=0), Status.MAX_TURNS, 4),
        ("done", Manner(), Status.FAILURE, 1),
        ("fail", Manner(), Status.FAILURE, 1),
        ("wait 0", Manner(max_repeats=2), Status.FAILURE, 3),
    ],
)
def test_ends_that_the_policy_causes_have_the_reward_0(
    policy: VisionLanguageModel, say: str, manner: Manner, status: Status, turns: int
) -> None:
    task = Task(id="b", params={"program": "buttons", "hits": 9, "grid": 2}, evaluator=SOLVED, max_turns=4)
    [found], _ = play(policy, lambda key: say, tasks=[(task, 0, 0)], manner=manner)
    assert (found.status, found.reward, len(found.turns), found.status.counts) == (status, 0.0, turns, True)
    assert found.parse_errors == (3 if say == "nonsense" else 0)


def test_an_answer_that_is_no_action_is_told_so_and_the_episode_goes_on(policy: VisionLanguageModel) -> None:
    said = ["hm", "click 5 5", "click 0 0", "click 1 1"]
    [found], _ = play(policy, lambda key: said[key[-1]], manner=Manner(screenshots=2))
    assert [turn.action is None for turn in found.turns] == [True, True, False, False]
    shown = found.turns[2].shown.messages
    assert [m["role"] for m in shown] == ["user", "assistant", "user", "assistant", "user"]
    assert shown[1]["content"] == "hm" and "is outside of the screen" in str(shown[4]["content"])
    assert sum("image" in str(m["content"]) for m in shown) == 2 == len(found.turns[2].shown.pictures)
    assert found.turns[2].shown.ids.count(policy.picture_id) == policy.pieces(found.turns[2].shown.media)


@pytest.mark.parametrize("limit", [None, 60])
def test_the_oldest_turns_leave_a_prompt_that_is_too_long(policy: VisionLanguageModel, limit: int | None) -> None:
    task = Task(id="b", params={"program": "buttons", "hits": 9, "grid": 2}, evaluator=SOLVED, max_turns=6)
    manner = Manner(history=4, max_prompt_tokens=limit, max_repeats=0)
    [found], _ = play(policy, lambda key: "click 0 0", tasks=[(task, 0, 0)], manner=manner)
    last = found.turns[-1].shown
    assert str(last.messages[0]["content"]).count("click") == 1, "the instruction stays"
    assert len(last.messages) == 9 if limit is None else len(last.ids) <= 60 and len(last.messages) < 9


# ---------------------------------------------------------------------- failures that are nobody's
class Flaky(Worlds):
    """Its first `bad` worlds fail in `where`."""

    def __init__(self, bad: int, where: str, limits: Limits | None = None) -> None:
        super().__init__(limits)
        self.bad, self.where = bad, where

    def check(self, task: Task) -> None: ...

    async def on_open(self) -> World:
        self.bad -= 1
        return FlakyWorld(self.limits, self.where if self.bad >= 0 else "")


class FlakyWorld(World):
    kinds = frozenset({"wait"})

    def __init__(self, limits: Limits, where: str) -> None:
        super().__init__(limits)
        self.where = where

    async def _perhaps(self, where: str) -> None:
        if where == self.where:
            raise WorldError("the world is gone")
        if f"{where} hangs" == self.where:
            await asyncio.sleep(600)

    async def on_reset(self, task: Task, seed: int) -> str:
        await self._perhaps("reset")
        return "say done"

    async def on_screenshot(self) -> Observation:
        await self._perhaps("screenshot")
        return Observation(text="a text", ended=self.ended)

    async def on_execute(self, action: Action) -> None:
        await self._perhaps("execute")

    async def on_evaluate(self) -> Outcome:
        await self._perhaps("evaluate")
        return Outcome(self.answer == "x", float(self.answer == "x"))


PLAIN = Task(id="p")


@pytest.mark.parametrize("where", ["reset", "screenshot", "execute", "evaluate", "execute hangs", "evaluate hangs"])
def test_a_world_that_fails_is_replaced_and_a_lost_episode_has_no_reward(policy: VisionLanguageModel, where: str) -> None:
    limits = Limits(execute=0.2, evaluate=0.2)
    again, _ = play(policy, lambda key: "done x", worlds=Flaky(2, where, limits), tasks=[(PLAIN, 0, 0)])
    assert (again[0].status, again[0].reward, again[0].attempt) == (Status.SUCCESS, 1.0, 2)
    tasks = [(PLAIN, 0, n) for n in range(4)]
    lost, _ = play(policy, lambda key: "done x", worlds=Flaky(1, where, limits), tasks=tasks, world_retries=0)
    status = Status.RESET_FAILED if where == "reset" else Status.ENV_ERROR
    assert sorted(t.status for t in lost) == sorted([status, *[Status.SUCCESS] * 3])
    [gone] = [t for t in lost if not t.status.counts]
    assert math.isnan(gone.reward) and gone.why
    rollout = rollout_of(lost, {0: {"prompt": "p"}}, policy, Manner())
    assert len(rollout) == 3 and gone.number not in rollout.columns["trajectory"]


def test_metrics_are_of_episodes_that_were_not_lost_and_nan_where_all_were() -> None:
    ends = [Status.SUCCESS, Status.FAILURE, Status.PARSE_ERROR, Status.ENV_ERROR]
    found = [Trajectory(BUTTONS, 0, n, 3, status=status, seconds=float(n)) for n, status in enumerate(ends)]
    metrics = trajectory_metrics(found)
    assert metrics["success"] == metrics["episodes/parse_error"] == pytest.approx(1 / 3)
    assert (metrics["episodes/lost"], metrics["episodes/seconds"]) == (0.25, 1.0)
    lost = trajectory_metrics(found[3:])
    assert lost.pop("episodes/lost") == 1.0 and lost.pop("episodes/retries") == 0.0 and all(map(math.isnan, lost.values()))


def test_too_many_lost_episodes_end_the_run_with_a_sentence(policy: VisionLanguageModel) -> None:
    with pytest.raises(RolloutError, match=r"2 of 2 episodes were lost \(2 by env_error\).*min_valid_fraction=0.5.*the world is gone"):
        play(policy, lambda key: "done x", worlds=Flaky(9, "execute"), tasks=[(PLAIN, 0, 0), (PLAIN, 0, 1)], world_retries=0)
    kept, _ = play(policy, lambda key: "done", worlds=Flaky(9, "execute"), tasks=[(PLAIN, 0, 0)], world_retries=0, min_valid_fraction=0.0)
    rollout = rollout_of(kept, {0: {"prompt": "p"}}, policy, Manner(parse_penalty=0.1))
    assert len(rollout) == 1 and not rollout.mask.any() and all(values.isnan().all() for values in rollout.rewards.values())
    assert policy.misplaced(rollout.tokens[0].tolist(), rollout.media[0]) == "", "the row that only fills up has a picture"


def test_an_error_of_the_engine_is_raised_and_nothing_is_left_open(policy: VisionLanguageModel) -> None:
    def broken(key: tuple[Any, ...]) -> str:
        raise ValueError("no weights")

    with pytest.raises(ValueError, match="no weights"):
        play(policy, broken)


def test_an_episode_that_takes_too_long_ends_as_the_policys(policy: VisionLanguageModel) -> None:
    task = Task(id="p", max_turns=10**6)
    [found], _ = play(
        policy, lambda key: "wait 0.2", worlds=Flaky(0, ""), tasks=[(task, 0, 0)], manner=Manner(episode_s=1.0, action_delay_s=0.5)
    )
    assert (found.status, found.reward) == (Status.TASK_TIMEOUT, 0.0) and found.turns


# ---------------------------------------------------------------------- requests and rows
def test_requests_of_all_episodes_are_answered_together_in_the_order_of_their_keys(policy: VisionLanguageModel) -> None:
    tasks = [(BUTTONS, group, number) for group in range(2) for number in range(3)]
    found, engine = play(policy, lambda key: "wait 0", tasks=tasks, manner=Manner(max_repeats=0), patience_s=60.0)
    assert [len(batch) for batch in engine.batches] == [6] * 4
    assert all(batch == sorted(batch, key=lambda key: tuple(map(str, key))) for batch in engine.batches)
    assert [(t.group, t.number) for t in found] == [(g, n) for _, g, n in tasks]


class OneWaits(TinyDesktops):
    """The first world carries out its first action when all others are closed."""

    async def on_open(self) -> World:
        world, first = await super().on_open(), self.counts["opened"] == 0
        carry_out = world.on_execute

        async def on_execute(action: Action) -> None:
            while first and self.counts["closed"] < 2:
                await asyncio.sleep(0.01)
            await carry_out(action)

        world.on_execute = on_execute  # type: ignore[method-assign]
        return world


def test_a_straggler_does_not_hold_the_others(policy: VisionLanguageModel) -> None:
    tasks = [(BUTTONS, 0, number) for number in range(3)]
    found, engine = play(policy, lambda key: "wait 0", worlds=OneWaits(size=64), tasks=tasks, manner=Manner(max_repeats=0), patience_s=0.05)
    assert [(t.status, len(t.turns)) for t in found] == [(Status.MAX_TURNS, 4)] * 3
    assert [{key[-3] for key in batch} for batch in engine.batches[-3:]] == [{0}] * 3


def test_siblings_share_the_world_and_not_the_answers() -> None:
    task = Task(id="t")
    jobs = jobs_of([(task, 0, 0), (task, 0, 1), (task, 1, 0)], seed=5, place=("train", 7))
    assert jobs[0].world_seed == jobs[1].world_seed != jobs[2].world_seed and len({job.key for job in jobs}) == 3
    assert jobs == jobs_of([(task, 0, 0), (task, 0, 1), (task, 1, 0)], seed=5, place=("train", 7))
    assert jobs_of([(Task(id="t", seed=9), 0, 0)], seed=5, place=())[0].world_seed == 9
    assert isinstance(jobs[0], Job)


def test_rows_are_turns_as_they_were_asked_and_answered(policy: VisionLanguageModel) -> None:
    said = {0: ["hm", "click 0 0", "wait 0", "wait 0.1"], 1: ["done"]}
    tasks = [(BUTTONS, 0, 0), (BUTTONS, 0, 1)]
    found, _ = play(policy, lambda key: said[key[-3]][key[-1]], tasks=tasks)
    rollout = rollout_of(found, {0: {"prompt": "p"}}, policy, Manner(parse_penalty=0.25))
    assert rollout.columns["trajectory"].tolist() == [0, 0, 0, 0, 1] and rollout.columns["turn"].tolist() == [0, 1, 2, 3, 0]
    assert rollout.columns["state"][0] == rollout.columns["state"][4], "both began with the same screen"
    assert rollout.rewards["format"].tolist() == [-0.25] * 4 + [0.0] and rollout.rewards["task"].tolist() == [0.0] * 5
    for i, turn in enumerate(turn for t in found for turn in t.turns):
        ids = rollout.tokens[i, : int(rollout.lengths[i])].tolist()
        assert ids == [*turn.shown.ids, *turn.sample.ids] and int(rollout.mask[i].sum()) == len(turn.sample.ids)
        assert torch.equal(rollout.media[i][0], turn.shown.media[0])


@pytest.mark.parametrize("settings", [{"concurrency": 0}, {"requests": 0}, {"min_valid_fraction": 1.5}])
def test_settings_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"model.episodes.{next(iter(settings))}="):
        Episodes(**settings)
