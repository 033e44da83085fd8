"""`--ckpt_path` as a word or an address finds what it says, or says what it does not find."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from toy import ToyData, toy_method, toy_trainer

from lit_rl.checkpoints.choosing import choose_checkpoint
from lit_rl.errors import ConfigError


def keepers(folder: Path, **best: Any) -> list[ModelCheckpoint]:
    given: dict[str, Any] = dict(monitor="val/brightness", mode="max", save_top_k=2, filename="{epoch}") | best
    return [
        ModelCheckpoint(dirpath=folder / "best", **given),
        ModelCheckpoint(dirpath=folder / "all", every_n_train_steps=1, save_last=True, filename="{step}"),
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder, and the best file in it as the run itself knew it."""
    folder = tmp_path_factory.mktemp("run")
    kept = keepers(folder)
    settings: dict[str, Any] = dict(callbacks=kept, enable_checkpointing=True, max_epochs=5, limit_val_batches=1.0)
    toy_trainer(folder, **settings).fit(toy_method(lr=3e-2), ToyData())
    return folder, kept[0].best_model_path


def test_the_best_is_found_in_a_new_process(run: tuple[Path, str]) -> None:
    assert choose_checkpoint("best", keepers(run[0]), str(run[0])) == run[1]


def test_the_best_is_found_after_a_move(run: tuple[Path, str], tmp_path: Path) -> None:
    shutil.copytree(run[0], tmp_path / "copy")
    assert choose_checkpoint("best", keepers(tmp_path / "copy"), "") == str(tmp_path / "copy" / "best" / Path(run[1]).name)


def test_the_best_of_nothing(run: tuple[Path, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="best is what a ModelCheckpoint with monitor has kept"):
        choose_checkpoint("best", keepers(run[0])[1:], "")
    with pytest.raises(ConfigError, match="best is what a ModelCheckpoint with monitor has kept"):  # whose newest are no best ones
        choose_checkpoint("best", keepers(run[0], monitor="step", filename="{step}"), "")
    with pytest.raises(ConfigError, match=r"no checkpoint in .* is known to be the best by val/brightness: run fit first"):
        choose_checkpoint("best", keepers(tmp_path), "")


def test_hpc(run: tuple[Path, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no hpc_ckpt_\*.ckpt, .* use --ckpt_path last"):
        choose_checkpoint("hpc", [], str(tmp_path))
    for number in (9, 10):
        torch.save({"global_step": number}, tmp_path / f"hpc_ckpt_{number}.ckpt")
    assert choose_checkpoint("hpc", [], str(tmp_path)) == str(tmp_path / "hpc_ckpt_10.ckpt")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("registry:me/model", "needs the package litmodels"),
        ("nothing://bucket/a.ckpt", "cannot be read: Protocol not known: nothing; download"),
        ("http://127.0.0.1:9/a.ckpt", "cannot be read: there is no such file, or nobody answers"),
        ("file:///not/there.ckpt", "no such file or folder"),
    ],
)
def test_addresses_that_lead_nowhere(path: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_checkpoint(path, [], "")


def test_an_address_on_this_machine(tmp_path: Path) -> None:
    torch.save({"global_step": 1}, tmp_path / "a b.ckpt")
    assert choose_checkpoint(f"{(tmp_path / 'a b.ckpt').as_uri()}", [], "") == str(tmp_path / "a b.ckpt")
