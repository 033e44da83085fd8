"""A checkpoint of another release gets a sentence, before anything is loaded from it: files, FSDP2's folders and DeepSpeed's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from toy import ToyData, toy_config, toy_method, toy_trainer

from lit_rl.checkpoints.files import AtomicCheckpointIO
from lit_rl.checkpoints.version import CHECKPOINT_VERSION, KEY, check_file
from lit_rl.errors import ConfigError

LAYOUTS = {"file": "a.ckpt", "fsdp2": "a.ckpt/meta.pt", "deepspeed": "a.ckpt/checkpoint/mp_rank_00_model_states.pt"}
"""Where each kind of checkpoint holds what is beside the weights."""


def write(folder: Path, kind: str, content: dict[str, Any]) -> Path:
    file = folder / LAYOUTS[kind]
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content | {"state_dict": {"w": torch.zeros(3)}, "global_step": 7}, file)
    return folder / "a.ckpt"


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({}, "is of version 0, of an earlier release, and this one reads 1: continue with the release that wrote it, or start a new run"),
        (
            {KEY: CHECKPOINT_VERSION + 1},
            f"is of version {CHECKPOINT_VERSION + 1}, and this release reads {CHECKPOINT_VERSION}: update lit-rl",
        ),
        ({KEY: CHECKPOINT_VERSION}, None),
    ],
)
def test_the_version_is_read_from_every_kind_of_checkpoint(tmp_path: Path, kind: str, content: dict[str, Any], said: str | None) -> None:
    checkpoint = write(tmp_path, kind, content)
    if said is None:
        check_file(checkpoint)
        return
    with pytest.raises(ConfigError) as raised:
        check_file(checkpoint)
    assert str(raised.value).startswith(f"checkpoint {checkpoint} ") and said in str(raised.value)


def test_what_cannot_be_read_is_told_of_when_it_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_bytes(b"no archive")
    check_file(tmp_path / "a.ckpt")
    with pytest.raises(ConfigError, match="a.ckpt"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "a.ckpt")


def test_a_run_of_an_earlier_release_is_not_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command line, and by a Trainer of one's own."""
    from lit_rl.command_line.run import CLI

    (tmp_path / "run.yaml").write_text(yaml.safe_dump(toy_config(tmp_path)))
    monkeypatch.setattr("sys.argv", ["cli.py", "fit", "--config", str(tmp_path / "run.yaml"), "--trainer.max_epochs", "1"])
    CLI()
    last = tmp_path / "checkpoints/last.ckpt"
    stored = torch.load(last, weights_only=True)
    assert stored.pop(KEY) == CHECKPOINT_VERSION
    AtomicCheckpointIO().save_checkpoint(stored, last)
    monkeypatch.setattr("sys.argv", ["cli.py", "fit", "--config", str(tmp_path / "run.yaml"), "--ckpt_path", str(last)])
    with pytest.raises(SystemExit) as done:
        CLI()
    said = capsys.readouterr().err
    assert done.value.code == 2 and f"error: checkpoint {last} is of version 0, of an earlier release" in said
    with pytest.raises(ConfigError, match="the checkpoint is of version 0"):
        toy_trainer(tmp_path, max_epochs=9).fit(toy_method(), ToyData(), ckpt_path=str(last))


def test_a_deepspeed_folder_continues_on_as_many_processes(tmp_path: Path) -> None:
    """The names of its files are enough: nothing is loaded."""
    (tmp_path / "checkpoint").mkdir()
    for rank in range(4):
        (tmp_path / f"checkpoint/bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    check_file(tmp_path, 4)
    check_file(tmp_path)
    with pytest.raises(ConfigError, match="that 4 processes wrote, and this run has 2: continue with 4"):
        check_file(tmp_path, 2)
