"""A run as a process of its own: `stoppable_run.py FOLDER PROCESSES [CHECKPOINT]`. Makes FOLDER/ready.<rank> at step 4 and waits a bit."""

import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from toy import ToyData, toy_method, toy_trainer

from callbacks.graceful_stop import GracefulStop
from callbacks.rng_state import RngState
from lit_rl.checkpoints.files import AtomicCheckpointIO, resolve_checkpoint


class WaitAtStep4(L.Callback):
    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 4 and not self.continued:
            (Path(trainer.default_root_dir) / f"ready.{trainer.global_rank}").touch()
            time.sleep(1 + 0.5 * trainer.global_rank)  # the signal comes in these seconds, and ranks are not at the same place

    def __init__(self, continued: bool) -> None:
        self.continued = continued


def main(folder: Path, processes: int, checkpoint: str | None) -> None:
    torch.set_num_threads(1)
    last = ModelCheckpoint(dirpath=folder / "checkpoints", save_last=True, every_n_epochs=1, save_on_train_epoch_end=True)
    callbacks = [GracefulStop(), RngState(), WaitAtStep4(continued=checkpoint is not None), last]
    trainer = toy_trainer(
        folder, callbacks=callbacks, max_epochs=3, enable_checkpointing=True, devices=processes, strategy="ddp" if processes > 1 else "auto"
    )
    AtomicCheckpointIO.install(trainer)
    module = toy_method(updates_per_iteration=3)
    path = resolve_checkpoint(checkpoint, [folder / "checkpoints"]) if checkpoint else None
    trainer.fit(module, ToyData(), ckpt_path=path)
    if trainer.is_global_zero:
        torch.save(module.state_dict(), folder / "final.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None)
