"""Time of an iteration by phase, and samples and actions per second."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence, Sized
from pathlib import Path
from typing import Literal, get_args

import lightning as L
import torch

from callbacks.base import Method, RLCallback, method_of
from lit_rl.ranks import gather_objects
from lit_rl.types import Minibatch

Phase = Literal["rollout", "score", "train", "validation", "other"]


class Throughput(RLCallback):
    """Wall-clock seconds of each iteration by what the process was doing, samples and trained actions per second.

    Logged once per iteration, as means over the processes:
      time/rollout_s     sampling and decoding; scoring of finished chunks goes on meanwhile
      time/score_s       blocked until the last rewards arrived
      time/train_s       forward, backward, optimizer
      time/validation_s  evaluation, in the iterations that have one
      time/other_s       everything else: checkpoints of the previous iteration, logging, loading
      throughput/images_per_s  sampled images (or answers) of all processes per second of the whole iteration
      throughput/pairs_per_s   trained (sample, step) pairs (or tokens) of all processes per second of training, repeated passes included

    The first five add up to the iteration's time. On a GPU the clock waits for the device once, at the end of an iteration.
    """

    def __init__(self) -> None:
        self._clock = Clock()
        self._samples = 0
        self._actions = 0

    # ------------------------------------------------------------------ what is going on
    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Start the clock."""
        self._clock.restart()

    def on_phase_start(self, trainer: L.Trainer, module: Method, name: str) -> None:
        """Count time for a phase."""
        self._clock.enter(name)

    def on_phase_end(self, trainer: L.Trainer, module: Method, name: str) -> None:
        """Count time for "other"."""
        self._clock.enter("other")

    def on_rollout_chunk(self, trainer: L.Trainer, module: Method, media: Sized, info: Sequence[object], total: int) -> None:
        """Count samples."""
        self._samples += len(media)

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Minibatch, batch_idx: int) -> None:
        """Count time and actions for training."""
        self._clock.enter("train")
        self._actions += method_of(module).count_actions(batch)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: object, batch: object, batch_idx: int) -> None:
        """Count time for "other" after the last minibatch."""
        if not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            return  # a GPU is still at work on this minibatch when the next one is cut
        if module.device.type == "cuda":
            torch.cuda.synchronize(module.device)
        self._clock.enter("other")

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Count time for validation."""
        self._clock.enter("validation")

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Count time for "other"."""
        self._clock.enter("other")

    # ------------------------------------------------------------------ the sums
    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Log the means over all processes. Collective."""
        everyone = gather_objects((dict(self._clock.restart()), self._samples, self._actions))
        self._samples = self._actions = 0
        mean = {phase: sum(seconds.get(phase, 0.0) for seconds, _, _ in everyone) / len(everyone) for phase in get_args(Phase)}
        row = {f"time/{phase}_s": seconds for phase, seconds in mean.items() if phase != "validation" or seconds}
        method = method_of(module)
        samples, actions = (sum(counts[i] for _, *counts in everyone) for i in range(2))
        if samples:
            row[f"throughput/{method.samples}_per_s"] = samples / sum(mean.values())
        if actions:
            row[f"throughput/{method.actions}_per_s"] = actions / mean["train"]
        method.report(row)


class Clock:
    """Seconds spent in named phases, one at a time, starting in "other"."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.phase, self.since = "other", time.perf_counter()

    def enter(self, phase: str) -> None:
        """Count time for another phase from now on."""
        now = time.perf_counter()
        self.seconds[self.phase] += now - self.since
        self.phase, self.since = phase, now

    def restart(self) -> defaultdict[str, float]:
        """Return the seconds so far and start again from zero, in "other"."""
        self.enter("other")
        seconds, self.seconds = self.seconds, defaultdict(float)
        return seconds


def plot_time(rows: Sequence[Mapping[str, float]], file: Path) -> None:
    """Draw where the time went: one stacked bar per epoch (a warm-up is the first), from logged rows that hold `time/<phase>_s`."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if "time/train_s" in row]
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    axes = figure.subplots()
    bottom = [0.0] * len(rows)
    for phase in get_args(Phase):
        seconds = [row.get(f"time/{phase}_s", 0.0) for row in rows]
        axes.bar(range(len(rows)), seconds, bottom=bottom, width=1.0, label=phase)
        bottom = [b + s for b, s in zip(bottom, seconds)]
    axes.set(xlabel="epoch", ylabel="seconds")
    figure.legend(loc="outside right upper")
    figure.savefig(file, dpi=120)
