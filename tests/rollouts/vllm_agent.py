"""A desktop on which an agent clicks one of four cells by a digit, for engines whose model knows digits alone."""

from __future__ import annotations

import json
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

import torch

from callbacks.base import RLCallback
from datamodules.agent_tasks import AgentTasks
from lit_rl.agents.codecs import Codec
from lit_rl.agents.episodes import Manner, Trajectory
from lit_rl.agents.play import Episodes
from lit_rl.agents.screens import Screen
from lit_rl.envs.actions import Action, ActionError, Kind
from lit_rl.envs.tiny_desktop import TinyDesktops
from lit_rl.methods.agent_grpo import AgentGRPO
from lit_rl.policies.vision_language import VisionLanguageModel
from lit_rl.policies.weights.lora import LoraSettings
from lit_rl.rollouts.answers import Answers
from lit_rl.rollouts.base import RolloutEngine, Sampling

SIZE = 64
CELLS = {"1": (1, 1), "2": (3, 1), "3": (1, 3), "4": (3, 3)}
"""Middle of each cell in quarters of the screen."""


class Cell(Codec):
    """The first digit is a click into its cell."""

    def __init__(self) -> None:
        super().__init__("pixels")

    def system(self, kinds: Collection[Kind], screen: Screen | None, max_turns: int) -> str:
        return ""

    def read(self, text: str, screen: Screen | None) -> Action:
        if text[:1] not in CELLS or screen is None:
            raise ActionError("??")
        x, y = (quarter * SIZE / 4 for quarter in CELLS[text[0]])
        return Action(kind="click", x=x, y=y)

    def write(self, action: Action, screen: Screen | None) -> str:
        return next(digit for digit, (x, y) in CELLS.items() if (x * SIZE / 4, y * SIZE / 4) == action.points[0])


class Seen(RLCallback):
    """All episodes of a run."""

    def __init__(self) -> None:
        self.episodes: list[Trajectory] = []

    def on_trajectories(self, trainer: Any, module: Any, trajectories: Any) -> None:
        self.episodes += trajectories


def cell_tasks(folder: Path) -> AgentTasks:
    evaluator = {"command": "desktop get solved", "equals": "1"}
    params = {"program": "buttons", "grid": 2, "hits": 2}
    rows = [{"id": f"t{i}", "instruction": "12?", "params": params, "evaluator": evaluator, "max_turns": 3} for i in range(4)]
    (folder / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return AgentTasks(train=str(folder / "tasks.jsonl"), val=str(folder / "tasks.jsonl"), eval_batch_size=4)


def clicker(model: Path, engine: RolloutEngine, lora: LoraSettings) -> AgentGRPO:
    manner = Manner(history=2, screenshots=2, max_repeats=0, parse_penalty=0.1)
    return AgentGRPO(
        VisionLanguageModel(str(model), lora=lora),
        episodes=Episodes(worlds=TinyDesktops(size=SIZE), codec=Cell(), manner=manner, concurrency=16),
        answers=Answers(engine=engine, sampling=Sampling(max_new_tokens=2)),
        prompts_per_iteration=4,
        group_size=4,
        optimizer=partial(torch.optim.AdamW, lr=3e-3),
    )
