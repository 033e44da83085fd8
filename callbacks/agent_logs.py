"""Two log files of an agent's run, for people: a line for each iteration and evaluation, and a line for each episode."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Literal

import lightning as L

from callbacks.base import Method, RLCallback, method_of
from lit_rl.agents.episodes import Trajectory
from lit_rl.ranks import gather_objects

LOGGERS = ("", "lightning.pytorch", "lightning.fabric")
"""Loggers whose messages go into the file: Lightning's hand nothing on to those above them."""


class AgentLogs(RLCallback):
    """Appends to `training.log` the numbers of each iteration and evaluation and log messages, to `rollouts.log` a line for each episode.

    `callbacks.episode_records.EpisodeRecords` writes episodes whole, for programs; these lines are for `tail -f`.

    Args:
        folder: The folder of both; the command line fills in `logs` in the run's folder.
        training: Name of the file of numbers; null = none.
        rollouts: Name of the file of episodes; null = none.
        level: Least level of the messages of this process that go into the file of numbers.
    """

    def __init__(
        self,
        folder: str | None = None,
        *,
        training: str | None = "training.log",
        rollouts: str | None = "rollouts.log",
        level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO",
    ) -> None:
        self.folder, self.training, self.rollouts, self.level = Path(folder or "logs"), training, rollouts, level
        self._handler: logging.Handler | None = None
        self._terminal: logging.Handler | None = None

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        """Begin to take messages, on the first process."""
        if trainer.is_global_zero and self.training and self._handler is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._handler = logging.FileHandler(self.folder / self.training, encoding="utf-8")
            self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
            self._handler.setLevel(self.level)
            if not logging.root.handlers and logging.lastResort is not None:  # which is silent as soon as there is another
                self._terminal = logging.lastResort
                logging.root.addHandler(self._terminal)
            for name in LOGGERS:
                logging.getLogger(name).addHandler(self._handler)

    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        """Close the file."""
        if self._handler is not None:
            for name in LOGGERS:
                logging.getLogger(name).removeHandler(self._handler)
            self._handler.close()
            self._handler = None
        if self._terminal is not None:
            logging.root.removeHandler(self._terminal)
            self._terminal = None

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        """Write what ended the run, and close the file."""
        self._line(f"the run ended: {type(exception).__name__}: {exception}")
        self.teardown(trainer, module, "fit")

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Write the numbers of an iteration."""
        numbers = {name: float(value) for name, value in trainer.callback_metrics.items() if not name.startswith("val/")}
        self._line(f"iteration {method_of(module).iteration + 1}/{trainer.max_epochs} step {trainer.global_step}: {told(numbers)}")

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Write the numbers of an evaluation."""
        if not trainer.sanity_checking:
            numbers = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
            self._line(f"evaluation after iteration {method_of(module).iteration + 1}: {told(numbers)}")

    def on_trajectories(self, trainer: L.Trainer, module: Method, trajectories: Sequence[Trajectory]) -> None:
        """Write a line for each episode of all processes."""
        stage, iteration = "train" if trainer.training else "eval", module.iteration + 1
        if self.rollouts is None or trainer.sanity_checking:
            return
        lines = [line for rank in gather_objects([line_of(t, iteration=iteration, stage=stage) for t in trajectories]) for line in rank]
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            now = datetime.now().isoformat(sep=" ", timespec="milliseconds")
            with (self.folder / self.rollouts).open("a", encoding="utf-8") as file:
                file.writelines(f"{now} {line}\n" for line in lines)

    def _line(self, text: str) -> None:
        if self._handler is not None:
            self._handler.handle(logging.LogRecord("lit_rl", logging.INFO, "", 0, "%s", (text,), None))


def told(numbers: Mapping[str, float]) -> str:
    """Numbers by name, in the order of their names."""
    return " ".join(f"{name}={value:.6g}" for name, value in sorted(numbers.items()))


def line_of(trajectory: Trajectory, *, iteration: int, stage: str) -> str:
    """One line for an episode: its place, how it ended, its reward, its turns, and the last action or why it was lost."""
    reward = "lost" if math.isnan(trajectory.reward) else f"{trajectory.reward:g}"
    last = next((str(turn.action.written()) for turn in reversed(trajectory.turns) if turn.action), "none")
    end = " ".join(trajectory.why.split()) if trajectory.why else f"last action {last}"
    return (
        f"iteration={iteration} {stage} task={trajectory.task.id} group={trajectory.group} number={trajectory.number} "
        f"status={trajectory.status} reward={reward} turns={len(trajectory.turns)} seconds={trajectory.seconds:.1f}: {end}"
    )
