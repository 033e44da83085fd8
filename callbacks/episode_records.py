"""Episodes of agents on the disk and on the screen: every one as a line of JSON, some as film strips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import lightning as L
import torch

from callbacks.base import Method, RLCallback, method_of
from callbacks.reported_samples import report_films
from callbacks.sample_gallery import spread
from lit_rl.agents.episodes import Trajectory
from lit_rl.agents.film import film_strip
from lit_rl.agents.records import header, read_records, record, written
from lit_rl.checkpoints.progress import minibatches_done
from lit_rl.checkpoints.replacing import atomic_file
from lit_rl.errors import ConfigError
from lit_rl.methods.agent_grpo import AgentGRPO
from lit_rl.modules.reporting import logged_step
from lit_rl.ranks import gather_objects


class EpisodeRecords(RLCallback):
    """Writes every episode as a line of `rollouts.jsonl`, of all processes, and some as film strips.

    A run that is continued takes back the lines of the iteration that it begins again. Film strips go to loggers that take images and
    into `film`, from the first process. See `lit_rl.agents.records` for the lines, which `python -m lit_rl.replay` executes again.

    Args:
        folder: The folder of both; the command line fills in `episodes` in the run's folder.
        strips: Film strips of a rollout or evaluation, spread evenly over the first process's episodes; 0 = none.
        every_n_iterations: Iterations from one rollout with strips to the next; evaluations always have theirs.
    """

    def __init__(self, folder: str | None = None, *, strips: int = 4, every_n_iterations: int = 10) -> None:
        if strips < 0 or every_n_iterations < 1:
            raise ConfigError(
                f"EpisodeRecords strips={strips} must not be negative, and every_n_iterations={every_n_iterations} at least 1"
            )
        self.folder, self.strips, self.every_n_iterations = Path(folder or "episodes"), strips, every_n_iterations
        self._evaluated = 0  # iteration whose evaluation may come again

    @property
    def file(self) -> Path:
        """The file of lines."""
        return self.folder / "rollouts.jsonl"

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        """Raise ConfigError where the method has no episodes, before any model is loaded."""
        if not isinstance(method_of(module), AgentGRPO):
            raise ConfigError(f"callbacks.episode_records.EpisodeRecords writes episodes of agents, and {type(module).__name__} has none")

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Begin the file, or take back what the run does again."""
        if trainer.is_global_zero:
            begun = trainer.current_epoch + (minibatches_done(trainer) > 0)  # iterations whose episodes are not played again
            rows = read_records(self.file)[1] if self.file.is_file() and trainer.ckpt_path else []
            self._write(method_of(module), [row for row in rows if row["iteration"] <= begun])
            self._evaluated = begun

    def _write(self, method: Method, rows: Sequence[Mapping[str, object]]) -> None:
        """A new file."""
        assert isinstance(method, AgentGRPO)
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.file) as file:
            file.write(written([header(method.episodes.worlds), *rows]).encode())

    def on_trajectories(self, trainer: L.Trainer, module: Method, trajectories: Sequence[Trajectory]) -> None:
        """Write the lines of all processes, and show some strips."""
        if trainer.sanity_checking:
            return
        stage, iteration = "train" if trainer.training else "eval", module.iteration + 1
        rows = gather_objects([record(trajectory, iteration=iteration, stage=stage) for trajectory in trajectories])
        if not trainer.is_global_zero:
            return
        if not self.file.is_file():  # a run that only evaluates
            self._write(module, [])
        if stage == "eval" and iteration == self._evaluated:  # once more, after the run was continued
            self._evaluated = 0
            self._write(module, [row for row in read_records(self.file)[1] if (row["iteration"], row["stage"]) != (iteration, stage)])
        with self.file.open("a", encoding="utf-8") as file:
            file.write(written(row for rank in rows for row in rank))
        if stage == "eval" or module.iteration % self.every_n_iterations == 0:
            self._show(trainer, module, trajectories, f"{stage}-{iteration:05d}")

    def _show(self, trainer: L.Trainer, module: Method, trajectories: Sequence[Trajectory], name: str) -> None:
        chosen = [trajectories[i] for i in sorted(spread(len(trajectories), self.strips))] if self.strips else []
        films = [(i, film) for i, trajectory in enumerate(chosen) if (film := film_strip(trajectory)) is not None]
        told = [(f"{chosen[i].task.id}: {chosen[i].instruction}", chosen[i].group, chosen[i].reward, film) for i, film in films]
        report_films(trainer, module, told)
        for i, film in films:
            (self.folder / "film").mkdir(exist_ok=True)
            film.save(self.folder / "film" / f"{name}-{i}.png")
            for logger in trainer.loggers:
                key, step = f"episodes/{name.partition('-')[0]}-{i}", logged_step(trainer, module)
                if hasattr(logger, "log_image"):
                    logger.log_image(key=key, images=[film], step=step)
                elif callable(add := getattr(getattr(logger, "experiment", None), "add_image", None)):
                    pixels = torch.frombuffer(bytearray(film.tobytes()), dtype=torch.uint8).view(film.height, film.width, 3)
                    add(key, pixels, step, dataformats="HWC")
