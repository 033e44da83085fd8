"""Weights that other programs load, written while training goes on."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Literal

import lightning as L

from callbacks.base import Method, callbacks_of, method_of
from callbacks.graceful_stop import GracefulStop
from callbacks.weight_folders import Held, WeightFolders
from lit_rl.checkpoints.contents import Checkpoint
from lit_rl.checkpoints.ip_adapter import Format
from lit_rl.checkpoints.progress import minibatches_done
from lit_rl.errors import ConfigError
from lit_rl.replay.loader import ReplayLoader

FOLDERS = {"iteration": "iteration-{iteration}", "checkpoint": "checkpoint-{step}"}


class Export(WeightFolders):
    """Folders in `dirpath` with the weights as the policy's `save` writes them: what stock diffusers takes, or `ip-adapter.bin`.

    A folder appears whole or not at all, with the checksums of its files in `manifest.json`. Weights are gathered one tensor at a time on
    all processes; the first one keeps and writes them. The end of training is always exported. For live and averaged weights both, list
    two of them with a `dirpath` each.

    Args:
        dirpath: Folder of the exported folders; by default `export` in the run's folder, and that folder itself at checkpoints, with
            `ema` in it for averaged weights where live ones are exported too.
        at: Export after an "iteration", or with every "checkpoint" that is written (but one that GracefulStop writes in haste).
        every_n_epochs: Iterations between two exports (the warm-up counts as one).
        folder: Name of an exported folder, with {iteration} (finished rollouts) and {step} (optimizer steps) in it; by default
            iteration-{iteration}, or checkpoint-{step} at checkpoints.
        weights: What training holds ("live") or the average of `callbacks.ema.EMA` ("ema").
        format: Of the style adapter's file: standard {image_proj, ip_adapter [, image_proj_qformer]}, legacy {image_proj_mlp,
            attn_adapter}, or released, which has the Q-Former too. None is standard, and the only one for policies without an adapter.
        keep: Exports that are kept, the newest ones; None = all.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        *,
        at: Literal["iteration", "checkpoint"] = "iteration",
        every_n_epochs: int = 1,
        folder: str | None = None,
        weights: Held = "live",
        format: Format | None = None,
        keep: int | None = 3,
    ) -> None:
        if every_n_epochs < 1 or (keep is not None and keep < 1):
            raise ConfigError(f"Export every_n_epochs={every_n_epochs} and keep={keep} must be at least 1 (keep: or null for all)")
        if at == "checkpoint" and every_n_epochs != 1:
            raise ConfigError(
                f"Export at=checkpoint writes when ModelCheckpoint does, every_n_epochs={every_n_epochs} has no part in it: "
                "leave it out here and set it there, or set at: iteration"
            )
        super().__init__(dirpath or "export", weights=weights, format=format)
        self.at = at
        self.every_n_epochs = every_n_epochs
        self.folder = FOLDERS[at] if folder is None else folder
        self.keep = keep
        self._check_folder()
        self._exported = -1

    @property
    def place(self) -> Path:
        """`dirpath`, and the name of a folder with its placeholders."""
        return self.dirpath / self.folder

    # ------------------------------------------------------------------ when
    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Export after every n-th iteration."""
        if self.at == "iteration" and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self.export(trainer, method_of(module), iteration=method_of(module).iteration + 1)

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: Checkpoint) -> None:
        """All processes come through here, once for each file of ModelCheckpoint: the weights of one step are exported once."""
        if self.at == "checkpoint" and trainer.state.fn == "fit" and self._exported != trainer.global_step and not self._in_haste(trainer):
            method = method_of(module)
            ended = minibatches_done(trainer) >= len(ReplayLoader(method))
            self.export(trainer, method, iteration=max(0, method.iteration + ended))

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Export the last weights."""
        if self._exported != trainer.global_step and not self._in_haste(trainer):
            self.export(trainer, method_of(module), iteration=method_of(module).iteration)  # the epoch counter has moved on

    # ------------------------------------------------------------------ what
    def export(self, trainer: L.Trainer, module: Method, *, iteration: int) -> None:
        """Write the folder of this iteration and of the step that has been reached. Collective."""
        target = self.dirpath / self.folder.format(iteration=iteration, step=trainer.global_step)
        self.write(trainer, module, target)
        if trainer.is_global_zero:
            self._forget_old(target.name)
        self._exported = trainer.global_step

    def _in_haste(self, trainer: L.Trainer) -> bool:
        """Time may be short, and the checkpoint is what counts."""
        return any(stop.leaving for stop in callbacks_of(trainer, GracefulStop))

    # ------------------------------------------------------------------ folders
    def _check_folder(self) -> None:
        fields = re.findall(r"{(\w*)}", self.folder)
        own = "step" if self.at == "checkpoint" else "iteration"  # one iteration may have several checkpoints
        if not {own, "step"} & set(fields) or set(fields) - {"iteration", "step"} or "/" in self.folder or self.folder.startswith("."):
            raise ConfigError(
                f"Export folder={self.folder!r} must be a name with {{{own}}} in it, for which the number comes: {FOLDERS[self.at]!r}; "
                "placeholders are {iteration} and {step}"
            )

    def _forget_old(self, newest: str) -> None:
        """Remove this run's oldest exports beyond `keep`. Later ones are an earlier run's, and are not counted."""
        pattern = re.escape(self.folder).replace(r"\{iteration\}", r"(\d+)").replace(r"\{step\}", r"(\d+)")

        def order(name: str) -> list[int] | None:
            match = re.fullmatch(pattern, name)
            return [int(number) for number in match.groups()] if match else None

        last = order(newest)
        found = [(key, folder) for folder in self.dirpath.iterdir() if (key := order(folder.name)) is not None and last and key <= last]
        for _, folder in sorted(found)[: -self.keep] if self.keep else []:
            shutil.rmtree(folder)
