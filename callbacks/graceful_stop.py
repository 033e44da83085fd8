"""Stop on request without losing anything: all processes agree, write a checkpoint and leave with exit code 143."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType

import lightning as L
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from callbacks.base import RLCallback, callbacks_of, is_trial

EXIT_CODE = 128 + signal.SIGTERM
"""143: what a process ended by SIGTERM reports; here it means stopped on request, with a checkpoint to continue from."""


class GracefulStop(RLCallback):
    """SIGTERM, SIGINT (Ctrl+C) or a STOP file end training after the current optimizer step, with a checkpoint that continues exactly.

    A signal only sets a flag, in whichever processes it reaches; after each optimizer step the processes agree (one flag reduced over
    all). Lightning's own SIGTERM handler broadcasts instead, which meets the collectives of other processes and hangs, and exits with 0.
    Asked during a rollout, the rollout is finished and saved with the checkpoint; asked in the last minibatch or the validation of an
    epoch, the epoch is finished. A second Ctrl+C interrupts at once, without a checkpoint.

    A run that ends by itself leaves its last iteration in `last.ckpt` too, whatever `every_n_epochs` of ModelCheckpoint is.

    The checkpoint goes where `--ckpt_path last` finds it: ModelCheckpoint's `last.ckpt`, or else `last.ckpt` in its folder. Before
    training has begun nothing is written. The STOP file is removed once it is obeyed; one older than this process is removed unread.

    Args:
        stop_file: Its path; None = `STOP` in `trainer.default_root_dir`. Looked for by the first process.
    """

    def __init__(self, stop_file: str | None = None) -> None:
        self.stop_file = stop_file
        self._born = time.time()
        self._pid = os.getpid()
        self._asked_by = ""
        self._step = 0
        self.leaving = False  # asked to stop, and all processes have agreed
        self._is_first = True

    # ------------------------------------------------------------------ being asked
    def on_sanity_check_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Take signals from here on."""
        self._listen(trainer)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Take signals, remove an old STOP file, and leave if asked already."""
        trainer.callbacks = [c for c in callbacks_of(trainer, L.Callback) if c is not self] + [self]  # type: ignore[attr-defined]  # others' states first
        self._listen(trainer)
        self._step = trainer.global_step
        stop = self._stop_path(trainer)
        if trainer.is_global_zero and stop.exists() and stop.stat().st_mtime < self._born:
            rank_zero_info(f"{stop} is older than this run and was removed; create it again to stop")
            stop.unlink()
        if self._agreed(trainer):
            self._leave(trainer, f"stopped by {self._asked_by or 'another process'} before training began, nothing new to save")

    def _listen(self, trainer: L.Trainer) -> None:
        """Put our handlers over Lightning's, which it sets right before training; it restores the original ones itself at the end."""
        self._pid, self._is_first = os.getpid(), trainer.is_global_zero
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a forked child: whoever signals it means the default
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if number == signal.SIGINT and self._asked_by == "SIGINT":
            raise KeyboardInterrupt
        self._asked_by = signal.Signals(number).name
        if self._is_first:  # print() is not safe in a handler
            again = "; Ctrl+C again: stop now, without a checkpoint" if number == signal.SIGINT else ""
            os.write(2, f"\n{self._asked_by}: stopping after this optimizer step with a checkpoint for --ckpt_path last{again}\n".encode())

    # ------------------------------------------------------------------ obeying
    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: object, batch: object, batch_idx: int) -> None:
        """Mid-epoch; on the last minibatch Lightning cannot resume, so the end of the epoch decides."""
        if trainer.global_step == self._step or trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            return  # a partial gradient is in no checkpoint
        self._step = trainer.global_step
        if self._agreed(trainer):
            self._save_and_leave(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Checkpoint callbacks still have their turn in this epoch; `on_train_end` comes next."""
        self._step = trainer.global_step
        self.leaving = self._agreed(trainer)
        trainer.should_stop = trainer.should_stop or self.leaving

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Leave if asked, and see that `last.ckpt` holds the end."""
        if self.leaving:
            self._save_and_leave(trainer)
        keeper = self._keeper(trainer)
        if keeper is not None and keeper._last_global_step_saved != trainer.global_step and not is_trial(trainer):
            self._save(trainer)

    def _agreed(self, trainer: L.Trainer) -> bool:
        """True when any process was asked to stop. Collective."""
        if not self._asked_by and trainer.is_global_zero and self._stop_path(trainer).exists():
            self._asked_by = "the STOP file"
        return trainer.strategy.reduce_boolean_decision(bool(self._asked_by), all=False)

    def _save_and_leave(self, trainer: L.Trainer) -> None:
        self.leaving = True
        path = self._save(trainer)
        for logger in trainer.loggers:
            logger.save()
        self._leave(
            trainer, f"stopped by {self._asked_by or 'another process'} after step {trainer.global_step}: continue with --ckpt_path {path}"
        )

    def _save(self, trainer: L.Trainer) -> Path:
        path = self._checkpoint_path(trainer)
        if trainer.is_global_zero and path.is_symlink():
            path.unlink()  # save_last="link": not the file that it points to
        trainer.save_checkpoint(path, weights_only=False)
        return path

    def _leave(self, trainer: L.Trainer, message: str) -> None:
        """End this process by an exception, so that Lightning closes everything but runs no further hooks of training."""
        if trainer.is_global_zero:
            self._stop_path(trainer).unlink(missing_ok=True)
        rank_zero_info(message)
        trainer.strategy.barrier("graceful_stop")
        environment = getattr(trainer.strategy, "cluster_environment", None)
        started_by_lightning = isinstance(environment, LightningEnvironment) and trainer.local_rank > 0
        raise SystemExit(0 if started_by_lightning else EXIT_CODE)  # Lightning kills the main process when a child of it reports a failure

    # ------------------------------------------------------------------ where
    def _stop_path(self, trainer: L.Trainer) -> Path:
        return Path(self.stop_file or Path(trainer.default_root_dir) / "STOP")

    def _keeper(self, trainer: L.Trainer) -> ModelCheckpoint | None:
        """The callback that keeps `last.ckpt`."""
        return next((c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.save_last), None)

    def _checkpoint_path(self, trainer: L.Trainer) -> Path:
        """The `last` of the checkpoint callback that keeps one, else the first free `last.ckpt`, `last-v1.ckpt`, ... beside its files."""
        callbacks = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        keeper = self._keeper(trainer)
        if keeper is not None and keeper.last_model_path:
            return Path(keeper.last_model_path)
        folder = Path(next((c.dirpath for c in callbacks if c.dirpath), Path(trainer.default_root_dir) / "checkpoints"))
        names = itertools.chain(["last.ckpt"], (f"last-v{i}.ckpt" for i in itertools.count(1)))
        free = next(folder / n for n in names if not (folder / n).exists() or str(folder / n) == str(trainer.ckpt_path))
        path = Path(trainer.strategy.broadcast(str(free)))
        if keeper is not None:
            keeper.last_model_path = str(path)  # part of the state that is saved: the continued run overwrites this file
        return path
