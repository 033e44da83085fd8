"""A progress bar that also moves while a rollout is sampled, and one line per finished iteration."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence, Sized
from typing import Literal, TextIO, TypeAlias

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.utilities.types import STEP_OUTPUT

from callbacks.base import Method, RLCallback, method_of
from lit_rl.types import Rollout

Shown: TypeAlias = dict[str, int | str | float | dict[str, float]]
"""Values of the bar by name."""


class Progress(RLCallback, TQDMProgressBar):
    """Live bar on a terminal; in a log file or CI plain lines, one per iteration and one now and then in between.

    Args:
        refresh_rate: Minibatches between two updates of the bar; 0 shows nothing at all.
        seconds_between_lines: At least so many between two lines of one iteration where there is no terminal.
        line: What is said of a finished iteration: all the bar's "metrics", or its optimizer "step", as in
            Step 100/10000 | Loss: 0.234 | Reward: 0.856 | KL: 0.0012 | LR: 9.8e-07
    """

    def __init__(self, refresh_rate: int = 1, *, seconds_between_lines: float = 30.0, line: Literal["metrics", "step"] = "metrics") -> None:
        super().__init__(refresh_rate=refresh_rate)
        self.line = line
        self.seconds_between_lines = seconds_between_lines
        self._lines = False
        self._done = 0
        self._evaluated = False
        self._epoch_began = self._last_line = time.perf_counter()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Choose between bar and lines."""
        super().setup(trainer, pl_module, stage)
        self._lines = self.is_enabled and trainer.is_global_zero and not sys.stdout.isatty()
        if self._lines:
            self.disable()

    # ------------------------------------------------------------------ what the bar says
    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Shown:
        """Reward first, of the current rollout; no version number, and of the warm-up's metrics only while it lasts."""
        metrics = {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}
        method = method_of(pl_module)
        rollout = method.rollout_metrics
        reward: Shown = {"reward_mean": rollout["reward_mean"]} if "reward_mean" in rollout else {}
        return reward | {n: v for n, v in metrics.items() if n not in reward and (method.warming_up or not n.startswith("warmup/"))}

    def label(self, trainer: L.Trainer, module: Method) -> str:
        """ "iteration 3/100", or "warm-up"."""
        if module.warming_up:
            return "warm-up"
        last = (trainer.max_epochs or 0) - module.warmup_epochs
        return f"iteration {module.iteration + 1}" + (f"/{last}" if last > 0 else "")

    def _show(self, trainer: L.Trainer, module: Method, activity: str, total: int | float, unit: str) -> None:
        bar = self.train_progress_bar
        bar.unit, bar.initial, bar.postfix = f" {unit}", 0, ""
        bar.set_description(f"{self.label(trainer, module)} {activity}".rstrip(), refresh=False)
        bar.reset(total)
        self._done = 0

    def print(self, *args: object, sep: str = " ", end: str = "\n", file: TextIO | None = None, **kwargs: object) -> None:
        """Print a line above the bar, or into the log."""
        if self._lines:
            print(*args, sep=sep, end=end, file=file, flush=True)
        else:
            super().print(*args, sep=sep, end=end, file=file, **kwargs)

    def _say(self, line: Callable[[], str]) -> None:
        """A line in the log, unless the last one was just now; only then is it put together, which waits for a GPU's numbers."""
        if self._lines and time.perf_counter() - self._last_line >= self.seconds_between_lines:
            self._last_line = time.perf_counter()
            self.print(line())

    # ------------------------------------------------------------------ rollout and scoring
    def on_phase_start(self, trainer: L.Trainer, module: Method, name: str) -> None:
        """Begin the bar of a rollout, or say that rewards are awaited."""
        if name == "rollout":
            samples = module.prompts_per_iteration // trainer.world_size * module.group_size
            self._show(trainer, module, "rollout", samples, module.samples)
        elif name == "score":
            self.train_progress_bar.set_description(f"{self.label(trainer, module)} waiting for rewards")

    def on_rollout_chunk(self, trainer: L.Trainer, module: Method, media: Sized, info: Sequence[object], total: int) -> None:
        """Move the bar by the samples of a chunk."""
        self._done += len(media)
        bar = self.train_progress_bar
        bar.total, bar.n = total, self._done
        bar.refresh()
        self._say(lambda: f"{self.label(trainer, module)}: rollout {self._done}/{total} {module.samples}")

    def on_rollout_end(self, trainer: L.Trainer, module: Method, rollout: Rollout) -> None:
        """Begin the bar of the training on a rollout."""
        self._show(trainer, module, "training", self.total_train_batches, "minibatches")
        self.train_progress_bar.set_postfix(self.get_metrics(trainer, module))

    # ------------------------------------------------------------------ training
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin the bar."""
        super().on_train_start(trainer, pl_module)
        self._epoch_began = self._last_line = time.perf_counter()
        self._show(
            trainer, method_of(pl_module), "", self.total_train_batches, "minibatches"
        )  # on_train_epoch_start is left out after some resumes

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin the bar of an epoch."""
        super().on_train_epoch_start(trainer, pl_module)
        self._show(trainer, method_of(pl_module), "", self.total_train_batches, "minibatches")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: STEP_OUTPUT, batch: object, batch_idx: int
    ) -> None:
        """A line now and then, where there is no terminal."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        method = method_of(pl_module)
        self._say(
            lambda: f"{self.label(trainer, method)}: minibatch {batch_idx + 1}/{self.total_train_batches}{self._metrics(trainer, method)}"
        )

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The line that stays."""
        super().on_train_epoch_end(trainer, pl_module)
        seconds, self._epoch_began = time.perf_counter() - self._epoch_began, time.perf_counter()
        method = method_of(pl_module)
        if self.line == "step" and not method.warming_up:
            self.print(self._step(trainer, method))
        else:
            loss = trainer.callback_metrics.get("loss")  # the mean over the iteration's minibatches
            said = "" if loss is None or method.warming_up else f"  loss {float(loss):.4g}"
            self.print(f"{self.label(trainer, method)}:{self._metrics(trainer, method)}{said}  ({seconds:.1f} s)")
        self._evaluated, self._last_line = False, time.perf_counter()

    def _step(self, trainer: L.Trainer, module: Method) -> str:
        """Metrics of the iteration under the names of training logs, then the bar's of an evaluation under their own."""
        each = module.inner_epochs * module.updates
        last = trainer.global_step + ((trainer.max_epochs or 0) - trainer.current_epoch - 1) * each
        known = trainer.callback_metrics
        scores = [n for n in trainer.progress_bar_metrics if self._evaluated and n.startswith("val/")]
        names = {"Loss": "loss", "Reward": "reward_mean", "KL": "kl_divergence"} | {n: n for n in scores}
        said = [f"{label}: {float(known[name]):.4g}" for label, name in names.items() if name in known]
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        return " | ".join([f"Step {trainer.global_step}/{last}", *said, f"LR: {rate:.2g}"])

    def _metrics(self, trainer: L.Trainer, module: Method) -> str:
        shown = {n: v for n, v in self.get_metrics(trainer, module).items() if self._evaluated or not n.startswith("val/")}
        return "".join(f"  {name} {float(value):.4g}" for name, value in shown.items() if not isinstance(value, dict))

    # ------------------------------------------------------------------ evaluation
    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Call the bar "evaluation"."""
        super().on_validation_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)
        if batch_idx == 0:
            self.val_progress_bar.set_description("evaluation")

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: STEP_OUTPUT, batch: object, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """A line now and then, where there is no terminal."""
        super().on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)
        self._say(lambda: f"evaluation: batch {batch_idx + 1}/{self.total_val_batches_current_dataloader}")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the scores of this evaluation with the iteration."""
        self._evaluated = not trainer.sanity_checking
        super().on_validation_end(trainer, pl_module)
