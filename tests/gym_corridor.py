"""An environment of gymnasium for tests: a corridor of five cells with a wall on the left and a goal on the right."""

from __future__ import annotations

import os
import time

import gymnasium
import numpy as np

CELLS = 5


class Corridor(gymnasium.Env):
    """fault: What a step to the left does: `hang`, `die` or `raise`; `blind`: a package that draws is missing."""

    metadata = {"render_modes": ["rgb_array", "ansi"]}  # noqa: RUF012

    def __init__(self, render_mode: str = "rgb_array", fault: str = "") -> None:
        self.render_mode, self.fault = render_mode, fault
        self.action_space, self.observation_space = gymnasium.spaces.Discrete(2), gymnasium.spaces.Discrete(CELLS)

    def reset(self, *, seed: int | None = None, options: dict[str, object] | None = None) -> tuple[int, dict]:
        super().reset(seed=seed)
        self.cell = int((options or {}).get("cell", self.np_random.integers(CELLS - 1)))
        return self.cell, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict]:
        if action == 0 and self.fault == "hang":
            time.sleep(3600)
        if action == 0 and self.fault == "die":
            os._exit(1)
        if action == 0 and self.fault == "raise":
            raise RuntimeError("out of order")
        self.cell = max(self.cell + (1 if action else -1), 0)
        over = self.cell == CELLS - 1
        return self.cell, float(over), over, False, {}

    def render(self) -> np.ndarray | str:
        if self.fault == "blind":
            raise gymnasium.error.DependencyNotInstalled("pygame is not installed")
        if self.render_mode == "ansi":
            return "".join("X" if cell == self.cell else "." for cell in range(CELLS))
        picture = np.zeros((16, 16 * CELLS, 3), np.uint8)
        picture[:, 16 * self.cell : 16 * (self.cell + 1)] = 255
        return picture


gymnasium.register("Corridor-v0", entry_point=Corridor)
