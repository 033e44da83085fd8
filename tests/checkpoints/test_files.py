"""Checkpoints appear whole or not at all, and a torn one is refused with the name of a good one."""

import os
import signal
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from lit_rl.checkpoints.files import AtomicCheckpointIO, newest_complete, resolve_checkpoint, what_is_missing
from lit_rl.checkpoints.position import step_of
from lit_rl.errors import ConfigError


def write(path: Path, *, age: float = 0.0, size: int = 1000) -> Path:
    """A checkpoint that is `age` seconds old."""
    AtomicCheckpointIO().save_checkpoint({"state_dict": {"w": torch.randn(size)}}, path)
    moment = path.stat().st_mtime - age
    os.utime(path, (moment, moment))
    return path


def truncate(path: Path, share: float) -> None:
    os.truncate(path, int(path.stat().st_size * share))


# ---------------------------------------------------------------------- writing
def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    checkpoint = {"state_dict": {"w": torch.randn(7)}, "epoch": 3, "nested": {"a": [1, "b"]}}
    AtomicCheckpointIO().save_checkpoint(checkpoint, tmp_path / "new" / "a.ckpt")
    back = AtomicCheckpointIO().load_checkpoint(tmp_path / "new" / "a.ckpt", weights_only=True)
    assert torch.equal(back["state_dict"]["w"], checkpoint["state_dict"]["w"]) and back["epoch"] == 3 and back["nested"] == {"a": [1, "b"]}
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.ckpt"]


def test_the_ending_of_a_name_may_be_left_out(tmp_path: Path) -> None:
    """Also where an export of the same name stands beside the checkpoint; a folder of shards is itself one."""
    state = write(tmp_path / "checkpoint-10.ckpt")
    assert resolve_checkpoint(str(tmp_path / "checkpoint-10"), []) == str(state)
    (tmp_path / "checkpoint-10").mkdir()
    (tmp_path / "checkpoint-10/adapter_model.safetensors").touch()
    for name in ("checkpoint-10", "checkpoint-10/", "checkpoint-10.ckpt"):
        assert resolve_checkpoint(f"{tmp_path}/{name}", []) == str(state)


def test_an_error_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = write(tmp_path / "last.ckpt")
    before = path.read_bytes()
    with pytest.raises(Exception, match="pickle"):
        AtomicCheckpointIO().save_checkpoint({"big": torch.randn(1000), "bad": lambda: None}, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_process_killed_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    """The writer, a forked process, is killed in the middle of `torch.save`."""
    path = write(tmp_path / "last.ckpt")
    before = path.read_bytes()
    child = os.fork()
    if child == 0:
        try:
            AtomicCheckpointIO().save_checkpoint({"w": torch.randn(1000), "bomb": _Bomb()}, path)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert path.read_bytes() == before
    assert resolve_checkpoint("last", [tmp_path]) == str(path)


def test_installed_where_lightning_would_use_its_own_writer(tmp_path: Path) -> None:
    def trainer(**kwargs: object) -> L.Trainer:
        return L.Trainer(accelerator="cpu", devices=1, logger=False, default_root_dir=tmp_path, **kwargs)

    plain, own, wrapped = trainer(), trainer(plugins=[_Own()]), trainer(plugins=[AsyncCheckpointIO()])
    for each in (plain, own, wrapped):
        AtomicCheckpointIO.install(each)
    assert type(plain.strategy.checkpoint_io) is AtomicCheckpointIO
    assert type(own.strategy.checkpoint_io) is _Own
    assert type(wrapped.strategy.checkpoint_io) is AsyncCheckpointIO


class _Own(TorchCheckpointIO):
    pass


class _Bomb:
    def __reduce__(self) -> str:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("still alive")


# ---------------------------------------------------------------------- finding
def test_last_is_the_newest_of_all_folders(tmp_path: Path) -> None:
    write(tmp_path / "a" / "last.ckpt", age=30)
    newest = write(tmp_path / "b" / "last-v1.ckpt", age=10)
    write(tmp_path / "b" / "last.ckpt", age=20)
    write(tmp_path / "b" / "epoch=9.ckpt")
    assert resolve_checkpoint("last", [tmp_path / "a", tmp_path / "b"]) == str(newest)


def test_last_of_nothing_starts_from_scratch(tmp_path: Path) -> None:
    assert resolve_checkpoint("last", [tmp_path, tmp_path / "not-there"]) is None


@pytest.mark.parametrize("link", ["gone", "dangling"])
def test_a_run_killed_while_its_link_moved_goes_on(link: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`save_last: link`: Lightning removes the old checkpoint, then the link, then makes the new link."""
    trainer = L.Trainer(accelerator="cpu", devices=1, logger=False, default_root_dir=tmp_path)
    first, second = (save(tmp_path / f"{step}.ckpt", step=step) for step in (10, 20))
    last = tmp_path / "last.ckpt"
    ModelCheckpoint._link_checkpoint(trainer, str(first), str(last))
    assert resolve_checkpoint("last", [tmp_path]) == str(last) and last.resolve() == first
    if link == "dangling":
        first.unlink()
    else:
        monkeypatch.setattr(os, "symlink", killed)
        with pytest.raises(KeyboardInterrupt):
            ModelCheckpoint._link_checkpoint(trainer, str(second), str(last))
    assert not last.exists()
    assert resolve_checkpoint("last", [tmp_path]) == str(second)


def save(path: Path, *, step: int) -> Path:
    AtomicCheckpointIO().save_checkpoint({"global_step": step, "state_dict": {"w": torch.zeros(3)}}, path)
    return path


def killed(*_: object) -> None:
    raise KeyboardInterrupt


def test_last_without_a_folder_says_which_knob(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dirpath"):
        resolve_checkpoint("last", [])


def test_last_is_told_by_its_content(tmp_path: Path) -> None:
    """A copy has the times of copying, in order of names: last-v1 (newer) before last."""
    kept = {"last-v1": 30, "last": 10, "last-v2": 20}
    for age, (name, step) in enumerate(kept.items()):
        torch.save({"epoch": step // 10, "global_step": step, "state_dict": {"w": torch.zeros(3)}}, tmp_path / f"{name}.ckpt")
        os.utime(tmp_path / f"{name}.ckpt", (1000 + age, 1000 + age))
    assert resolve_checkpoint("last", [tmp_path]) == str(tmp_path / "last-v1.ckpt")
    assert {name: step_of(tmp_path / f"{name}.ckpt") for name in kept} == kept


def test_folders_of_shards_are_told_by_their_content_too(tmp_path: Path) -> None:
    for name, step in {"last-v1": 300_000, "last": 70_000}.items():
        (tmp_path / f"{name}.ckpt").mkdir()
        (tmp_path / f"{name}.ckpt" / ".metadata").touch()
        torch.save({"epoch": 3, "global_step": step}, tmp_path / f"{name}.ckpt" / "meta.pt")
    assert resolve_checkpoint("last", [tmp_path]) == str(tmp_path / "last-v1.ckpt")
    (tmp_path / "zero.ckpt" / "checkpoint").mkdir(parents=True)
    torch.save({"module": {"global_step": "x"}, "global_step": 7}, tmp_path / "zero.ckpt" / "checkpoint" / "mp_rank_00_model_states.pt")
    assert step_of(tmp_path / "zero.ckpt") == 7


def test_what_has_no_step_or_cannot_be_read_comes_last(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.ckpt")
    (tmp_path / "text.ckpt").write_text("no archive")
    assert [step_of(tmp_path / f"{name}.ckpt") for name in ("list", "text", "none")] == [-1, -1, -1]


def test_a_path_that_is_not_there_names_what_is(tmp_path: Path) -> None:
    good = write(tmp_path / "epoch=3.ckpt")
    with pytest.raises(ConfigError, match=f"no such file.*use --ckpt_path {good}"):
        resolve_checkpoint(str(tmp_path / "epoch=4.ckpt"), [])
    with pytest.raises(ConfigError, match="no complete checkpoint"):
        resolve_checkpoint(str(tmp_path / "elsewhere" / "a.ckpt"), [])
    with pytest.raises(ConfigError, match=f"folder of checkpoints.*use --ckpt_path {good}"):
        resolve_checkpoint(str(tmp_path), [])


# ---------------------------------------------------------------------- looking inside
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused_with_the_newest_good_one(tmp_path: Path, share: float) -> None:
    write(tmp_path / "epoch=1.ckpt", age=30)
    good = write(tmp_path / "epoch=2.ckpt", age=20)
    truncate(write(tmp_path / "epoch=3.ckpt", age=10), 0.5)
    torn = write(tmp_path / "last.ckpt")
    truncate(torn, share)
    for asked in ("last", str(torn)):
        with pytest.raises(ConfigError, match=f"last.ckpt.*use --ckpt_path {good}"):
            resolve_checkpoint(asked, [tmp_path])


def test_a_file_with_a_hole_at_its_end_is_refused(tmp_path: Path) -> None:
    """A power cut can leave the right length and zeros."""
    path = write(tmp_path / "last.ckpt")
    with open(path, "r+b") as file:
        file.seek(-200, os.SEEK_END)
        file.write(bytes(200))
    assert "incomplete" in (what_is_missing(path) or "")


def test_looking_does_not_read_the_tensors(tmp_path: Path) -> None:
    path = write(tmp_path / "last.ckpt", size=10)
    with open(path, "r+b") as file:  # prepend 4 GiB of nothing: zip archives are read from their end
        data = file.read()
        file.seek(4 << 30)
        file.write(data)
    assert what_is_missing(path) is None


def fsdp2(folder: Path) -> Path:
    folder.mkdir()
    torch.save({"epoch": 1}, folder / "meta.pt")
    (folder / ".metadata").write_bytes(b"x")
    (folder / "__0_0.distcp").write_bytes(b"x")
    return folder


def deepspeed(folder: Path) -> Path:
    (folder / "checkpoint").mkdir(parents=True)
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        torch.save({"a": torch.zeros(3)}, folder / "checkpoint" / name)
    (folder / "latest").write_text("checkpoint")
    return folder


@pytest.mark.parametrize(
    "make, hurt, complaint",
    [
        (fsdp2, "meta.pt", "meta.pt"),
        (fsdp2, ".metadata", ".metadata"),
        (deepspeed, "latest", "latest"),
        (deepspeed, "checkpoint/mp_rank_00_model_states.pt", "model states"),
    ],
)
def test_sharded_folders(tmp_path: Path, make, hurt: str, complaint: str) -> None:
    good, torn = make(tmp_path / "epoch=1.ckpt"), make(tmp_path / "last.ckpt")
    assert what_is_missing(torn) is None and resolve_checkpoint("last", [tmp_path]) == str(torn)
    (torn / hurt).unlink()
    assert complaint in (what_is_missing(torn) or "")
    with pytest.raises(ConfigError, match=f"use --ckpt_path {good}"):
        resolve_checkpoint("last", [tmp_path])
    assert newest_complete(tmp_path) == good


def test_a_torn_shard_is_refused(tmp_path: Path) -> None:
    torn = deepspeed(tmp_path / "last.ckpt")
    truncate(torn / "checkpoint" / "zero_pp_rank_0_mp_rank_00_optim_states.pt", 0.5)
    with pytest.raises(ConfigError, match="optim_states"):
        resolve_checkpoint(str(torn), [])
