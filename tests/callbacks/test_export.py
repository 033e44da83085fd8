"""Exported folders hold the weights they name, whole, and only the newest stay."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from toy import ToyData, ToyPolicy, toy_method, toy_trainer

from callbacks.ema import EMA
from callbacks.export import Export
from callbacks.graceful_stop import GracefulStop
from lit_rl.checkpoints.manifest import folder_damage, read_manifest
from lit_rl.errors import ConfigError


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def read(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "weights.pt", weights_only=True)


def test_writes_live_weights_after_each_iteration_and_keeps_the_newest(tmp_path: Path) -> None:
    """10 iterations of which the last 2 are kept: 10 is newer than 9, not between 1 and 2."""
    module = toy_method()
    toy_trainer(tmp_path, callbacks=[Export(str(tmp_path / "out"), keep=2)], max_epochs=10).fit(module, ToyData())
    assert names(tmp_path / "out") == ["iteration-10", "iteration-9"]
    live = dict(module.policy.trainable())
    exported = read(tmp_path / "out" / "iteration-10")
    assert exported.keys() == live.keys() and all(torch.equal(exported[name], live[name]) for name in live)
    assert not all(torch.equal(read(tmp_path / "out" / "iteration-9")[name], live[name]) for name in live)


def test_later_exports_of_an_earlier_run_do_not_push_out_new_ones(tmp_path: Path) -> None:
    for run, iterations in (("earlier", 4), ("new", 2)):
        toy_trainer(tmp_path / run, callbacks=[Export(str(tmp_path / "out"), keep=2)], max_epochs=iterations).fit(toy_method(), ToyData())
    assert names(tmp_path / "out") == ["iteration-1", "iteration-2", "iteration-3", "iteration-4"]


def test_writes_the_average(tmp_path: Path) -> None:
    average = EMA(decay=0.9)
    trainer, module = toy_trainer(tmp_path, callbacks=[Export(str(tmp_path / "out"), weights="ema"), average]), toy_method()
    trainer.fit(module, ToyData())
    exported, held = read(tmp_path / "out" / "iteration-2"), average.averaged_weights(trainer, module)
    assert all(torch.equal(exported[name], held[name]) for name in held)
    assert not all(torch.equal(exported[name], p) for name, p in module.policy.trainable())


def test_the_end_is_exported_whatever_the_interval(tmp_path: Path) -> None:
    """A warm-up and 4 iterations, every second epoch: after iterations 1 and 3, and the end."""
    export = Export(str(tmp_path / "out"), every_n_epochs=2, keep=None)
    toy_trainer(tmp_path, callbacks=[export], max_epochs=5).fit(toy_method(warmup_steps=2), ToyData())
    assert names(tmp_path / "out") == ["iteration-1", "iteration-3", "iteration-4"]


class SecondSaveFails(ToyPolicy):
    saves = 0

    def save(self, folder: Path, weights: dict[str, Any]) -> None:
        super().save(folder, weights)
        self.saves += 1
        if self.saves == 2:
            raise OSError("No space left on device")


def test_a_failed_export_is_not_taken_for_one(tmp_path: Path) -> None:
    module = toy_method()
    module.policy = SecondSaveFails()
    with pytest.raises(OSError, match="No space"):
        toy_trainer(tmp_path, callbacks=[Export(str(tmp_path / "out"))]).fit(module, ToyData())
    assert [p.name for p in (tmp_path / "out").glob("iteration-*")] == ["iteration-1"]


def test_an_average_needs_its_callback(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs callbacks.ema.EMA"):
        toy_trainer(tmp_path, callbacks=[Export(str(tmp_path), weights="ema")]).fit(toy_method(), ToyData())


def test_every_checkpoint_has_its_export_live_and_averaged(tmp_path: Path) -> None:
    """2 steps of warm-up, then 2 iterations of 2: checkpoints at steps 2, 4, 6, by two callbacks at 4. Of step 4 the weights are those
    of the checkpoint, and the others its average."""
    live, ema = (Export(str(tmp_path / kind), at="checkpoint", weights=kind, keep=None) for kind in ("live", "ema"))  # type: ignore[arg-type]
    saves = [
        ModelCheckpoint(dirpath=tmp_path / "all", filename="{step}", every_n_train_steps=2, save_top_k=-1, save_last=True),
        ModelCheckpoint(dirpath=tmp_path / "epochs", filename="{epoch}", save_on_train_epoch_end=True),
    ]
    settings: dict[str, Any] = dict(max_epochs=3, enable_checkpointing=True, callbacks=[live, EMA(decay=0.9), ema, *saves])
    module = toy_method(warmup_steps=2, inner_epochs=2)
    toy_trainer(tmp_path, **settings).fit(module, ToyData())
    assert names(tmp_path / "live") == names(tmp_path / "ema") == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    stored = torch.load(tmp_path / "all" / "step=4.ckpt", weights_only=True)
    for name, tensor in read(tmp_path / "live" / "checkpoint-4").items():
        assert torch.equal(tensor, stored["state_dict"][f"policy.{name}"])
        assert torch.equal(read(tmp_path / "ema" / "checkpoint-4")[name], stored["ema"]["weights"][name])


def test_folders_are_named_by_iteration_and_step(tmp_path: Path) -> None:
    """Checkpoints inside iterations, of 2 steps each after a warm-up of 2. What else lies there is no export, whatever it is called."""
    (tmp_path / "out" / "it-1-7-best").mkdir(parents=True)
    export = Export(str(tmp_path / "out"), at="checkpoint", folder="it-{iteration}-{step}", keep=3)
    save = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=1)
    module = toy_method(warmup_steps=2, inner_epochs=2)
    toy_trainer(tmp_path, max_epochs=3, enable_checkpointing=True, callbacks=[export, save]).fit(module, ToyData())
    assert names(tmp_path / "out") == ["it-1-4", "it-1-5", "it-1-7-best", "it-2-6"]


def test_a_checkpoint_after_validation_is_exported_with_the_trained_weights(tmp_path: Path) -> None:
    """While it is validated, the average is in their place."""
    export = Export(str(tmp_path / "out"), at="checkpoint")
    save = ModelCheckpoint(dirpath=tmp_path, filename="{step}", monitor="val/brightness", mode="max", save_on_train_epoch_end=False)
    module = toy_method()
    settings: dict[str, Any] = dict(max_epochs=1, enable_checkpointing=True, limit_val_batches=1.0)
    toy_trainer(tmp_path, callbacks=[EMA(decay=0.9), export, save], **settings).fit(module, ToyData())
    assert names(tmp_path / "out") == ["checkpoint-1"]
    assert all(torch.equal(read(tmp_path / "out" / "checkpoint-1")[name], p) for name, p in module.policy.trainable())


class StopAt(L.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            (Path(trainer.default_root_dir) / "STOP").touch()


@pytest.mark.parametrize("step", [2, 3])  # the first and the last minibatch of the second iteration
def test_a_checkpoint_written_in_haste_has_none(tmp_path: Path, step: int) -> None:
    export = Export(str(tmp_path / "out"), at="checkpoint", keep=None)
    save = ModelCheckpoint(dirpath=tmp_path / "ckpt", save_last=True, every_n_epochs=1, save_on_train_epoch_end=True)
    with pytest.raises(SystemExit):
        toy_trainer(tmp_path, max_epochs=3, enable_checkpointing=True, callbacks=[export, GracefulStop(), StopAt(step), save]).fit(
            toy_method(inner_epochs=2), ToyData()
        )
    assert names(tmp_path / "out") == ["checkpoint-2"] and (tmp_path / "ckpt" / "last.ckpt").exists()


def test_two_exports_need_two_places(tmp_path: Path) -> None:
    exports = [Export(str(tmp_path)), EMA(), Export(str(tmp_path), weights="ema")]
    with pytest.raises(ConfigError, match="give one of them another dirpath"):
        toy_trainer(tmp_path, callbacks=exports).fit(toy_method(), ToyData())


def test_a_format_is_refused_before_training_where_there_is_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="format=legacy is one of a style adapter's file, and ToyPolicy trains none"):
        toy_trainer(tmp_path, callbacks=[Export(str(tmp_path), format="legacy")]).fit(toy_method(), ToyData())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(every_n_epochs=0), "every_n_epochs"),
        (dict(keep=0), "keep"),
        (dict(at="checkpoint", every_n_epochs=2), "leave it out here and set it there"),
        (dict(at="checkpoint", folder="iteration-{iteration}"), r"with \{step\} in it"),
        (dict(folder="adapter"), r"with \{iteration\} in it"),
        (dict(folder="{iteration}-{epoch}"), r"placeholders are \{iteration\} and \{step\}"),
        (dict(folder="ip/{iteration}"), "must be a name"),
    ],
)
def test_impossible_settings_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Export("out", **wrong)


def test_a_folder_has_the_checksums_of_its_files(tmp_path: Path) -> None:
    toy_trainer(tmp_path, callbacks=[Export(str(tmp_path / "out"))]).fit(toy_method(), ToyData())
    folder = tmp_path / "out" / "iteration-2"
    assert (read_manifest(folder) or {}).keys() == {"weights.pt"} and folder_damage(folder) is None
