"""A world of texts that a random miniature language model learns in seconds: say the digit, several times."""

from __future__ import annotations

import json
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

import torch
from toy_text import policy

from datamodules.agent_tasks import AgentTasks
from lit_rl.agents.codecs import Codec
from lit_rl.agents.episodes import Manner
from lit_rl.agents.play import Episodes
from lit_rl.agents.screens import Screen
from lit_rl.envs.actions import Action, ActionError, Kind
from lit_rl.envs.base import Observation, Outcome, World, Worlds
from lit_rl.envs.tasks import Task
from lit_rl.methods.agent_grpo import AgentGRPO
from lit_rl.policies.weights.lora import LoraSettings
from lit_rl.rollouts.answers import Answers
from lit_rl.rollouts.base import Sampling


class DigitWorld(World):
    """Success after `hits` times the digit 7; the reward is the share of them. An answer by 0 ends the episode at once."""

    kinds: frozenset[Kind] = frozenset({"type"})

    async def on_reset(self, task: Task, seed: int) -> str:
        self.hits, self.needed, self.first = 0, int(str(task.params["hits"])), seed % 10
        return f"{self.first}"

    async def on_screenshot(self) -> Observation:
        return Observation(text=str(self.hits), ended=self.hits >= self.needed)

    async def on_execute(self, action: Action) -> None:
        self.hits += action.text == "7"
        self.ended |= action.text == "0"

    async def on_evaluate(self) -> Outcome:
        return Outcome(self.hits >= self.needed, self.hits / self.needed)


class DigitWorlds(Worlds):
    """A supply of them."""

    kinds = DigitWorld.kinds

    def check(self, task: Task) -> None:
        assert "hits" in task.params

    async def on_open(self) -> DigitWorld:
        return DigitWorld(self.limits)


class FirstDigit(Codec):
    """The first character, where it is a digit."""

    def __init__(self) -> None:
        super().__init__("pixels")

    def system(self, kinds: Collection[Kind], screen: Screen | None, max_turns: int) -> str:
        return ""

    def read(self, text: str, screen: Screen | None) -> Action:
        if not text[:1].isdigit():
            raise ActionError("?")
        return Action(kind="type", text=text[0])

    def write(self, action: Action, screen: Screen | None) -> str:
        return action.text


def digit_tasks(folder: Path, count: int = 8) -> AgentTasks:
    rows = [{"id": f"t{i}", "params": {"hits": 1 + i % 2}, "max_turns": 2 + i % 3} for i in range(count)]
    (folder / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return AgentTasks(train=str(folder / "tasks.jsonl"), val=str(folder / "tasks.jsonl"), eval_batch_size=8)


def agent(model: Path, *, lr: float = 1e-2, keep_reference: bool = False, lora: LoraSettings | None = None, **settings: Any) -> AgentGRPO:
    episodes = Episodes(worlds=DigitWorlds(), codec=FirstDigit(), manner=Manner(history=1, max_repeats=0), patience_s=60.0)
    answers = Answers(sampling=Sampling(max_new_tokens=2), eval_sampling=Sampling(max_new_tokens=2))
    adam = partial(torch.optim.AdamW, lr=lr, eps=1e-3)
    defaults: dict[str, Any] = {"prompts_per_iteration": 8, "group_size": 8, "episodes": episodes, "answers": answers, "optimizer": adam}
    return AgentGRPO(policy(model, keep_reference=keep_reference, lora=lora), **defaults | settings)
