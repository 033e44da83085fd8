"""A checkpoint is read as it was written or not at all: one flipped bit, or a file cut short, missing or exchanged, is found."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from lit_rl.checkpoints.files import AtomicCheckpointIO, resolve_checkpoint, what_is_missing, what_is_wrong
from lit_rl.checkpoints.manifest import MANIFEST, entries, files_of, read_manifest, write_manifest
from lit_rl.errors import ConfigError

CONTENT = {"state_dict": {"w": torch.randn(300)}, "epoch": 3}


def written_file(path: Path) -> Path:
    AtomicCheckpointIO().save_checkpoint(CONTENT, path)
    return path


def fsdp2(path: Path, *, manifest: bool = True) -> Path:
    dcp.save({"state_dict": {"w": torch.ones(300), "v": torch.randn(7)}}, checkpoint_id=path, no_dist=True)
    torch.save({"epoch": 3}, path / "meta.pt")
    if manifest:
        write_manifest(path, [entries(path, 0, 1)])
    return path


def deepspeed(path: Path, *, manifest: bool = True) -> Path:
    (path / "checkpoint").mkdir(parents=True)
    for name in ("mp_rank_00_model_states", "zero_pp_rank_0_mp_rank_00_optim_states", "bf16_zero_pp_rank_1_mp_rank_00_optim_states"):
        torch.save({"w": torch.ones(300)}, path / "checkpoint" / f"{name}.pt")
    (path / "latest").write_text("checkpoint")
    if manifest:
        write_manifest(path, [entries(path, rank, 2) for rank in range(2)])
    return path


def flip(file: Path, position: int) -> None:
    with open(file, "r+b") as stream:
        stream.seek(position // 8)
        byte = stream.read(1)[0]
        stream.seek(position // 8)
        stream.write(bytes([byte ^ 1 << position % 8]))


# ---------------------------------------------------------------------- single files
def test_every_bit_of_a_file_counts(tmp_path: Path) -> None:
    """The data that zip's own CRC32 covers, and also headers, padding, directory and checksum."""
    path = written_file(tmp_path / "last.ckpt")
    assert what_is_wrong(path) is None
    for position in range(0, path.stat().st_size * 8, 37):
        flip(path, position)
        assert what_is_wrong(path) is not None, position
        flip(path, position)
    for position in range((path.stat().st_size - 60) * 8, path.stat().st_size * 8):
        flip(path, position)
        assert what_is_wrong(path) is not None, position
        flip(path, position)
    assert what_is_wrong(path) is None


def test_a_sealed_file_is_an_ordinary_one(tmp_path: Path) -> None:
    """For torch, mapped into memory or not, and for whoever copies it."""
    path = written_file(tmp_path / "last.ckpt")
    copy = shutil.copy(path, tmp_path / "copy.ckpt")
    for mmap in (False, True):
        read = torch.load(copy, weights_only=True, mmap=mmap)
        assert torch.equal(read["state_dict"]["w"], CONTENT["state_dict"]["w"]) and read["epoch"] == 3  # type: ignore[index]
    assert what_is_wrong(copy) is None


def test_files_of_earlier_releases_are_read_and_compared_with_their_crc(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "last.ckpt"
    torch.save(CONTENT, path)
    with caplog.at_level("INFO"):
        assert what_is_wrong(path) is None and AtomicCheckpointIO().load_checkpoint(path)["epoch"] == 3
    assert "is of an earlier release, without checksums" in caplog.text
    content = path.read_bytes()
    flip(path, content.index(CONTENT["state_dict"]["w"].numpy().tobytes()[:64]) * 8 + 11)  # type: ignore[index]
    assert "another content" in (what_is_wrong(path) or "")


def test_a_damaged_file_is_refused_with_the_newest_undamaged_one(tmp_path: Path) -> None:
    """By the command line before anything is loaded, and by whoever reads it."""
    good = written_file(tmp_path / "epoch=1.ckpt")
    damaged = [written_file(tmp_path / name) for name in ("epoch=2.ckpt", "last.ckpt")]
    for age, path in enumerate((good, *damaged)):
        os.utime(path, (age, age))
    for path in damaged:
        flip(path, path.stat().st_size * 4)
    for refuse in (lambda: resolve_checkpoint("last", [tmp_path]), lambda: AtomicCheckpointIO().load_checkpoint(damaged[1])):
        with pytest.raises(ConfigError, match=rf"last\.ckpt is damaged \(.*use --ckpt_path {good}$"):
            refuse()


@pytest.mark.parametrize("content", [b"", b"PK", b"PK\5\6" + bytes(18), os.urandom(500), b"PK\3\4" + os.urandom(500)])
def test_what_is_no_checkpoint_is_told_in_a_sentence(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "last.ckpt"
    path.write_bytes(content)
    for refuse in (lambda: resolve_checkpoint(str(path), []), lambda: AtomicCheckpointIO().load_checkpoint(path)):
        with pytest.raises(ConfigError, match=r"last\.ckpt .*no complete checkpoint is in"):
            refuse()


# ---------------------------------------------------------------------- folders
@pytest.mark.parametrize("write", [fsdp2, deepspeed])
def test_every_bit_of_a_folder_counts(tmp_path: Path, write: Any) -> None:
    path = write(tmp_path / "last.ckpt")
    assert what_is_wrong(path) is None
    for name in [*files_of(path), MANIFEST]:
        file = path / name
        for position in {*range(0, file.stat().st_size * 8, 997), file.stat().st_size * 8 - 3}:
            flip(file, position)
            assert Path(name).name in (what_is_wrong(path) or ""), (name, position)
            flip(file, position)
    assert what_is_wrong(path) is None


@pytest.mark.parametrize("write", [fsdp2, deepspeed])
def test_missing_and_shortened_files_are_found_without_reading(tmp_path: Path, write: Any) -> None:
    for name in files_of(write(tmp_path / "names")):
        path = write(tmp_path / name.replace("/", "-"))
        os.truncate(path / name, (path / name).stat().st_size - 1)
        assert f"{name} has" in (what_is_missing(path) or "")
        (path / name).unlink()
        assert what_is_missing(path) == f"lacks {name}"


def test_files_of_two_checkpoints_are_not_one(tmp_path: Path) -> None:
    """Each whole by itself, and of the same length."""
    one, two = fsdp2(tmp_path / "one"), fsdp2(tmp_path / "two")
    shutil.copy(one / "__0_0.distcp", two / "__0_0.distcp")
    assert what_is_missing(two) is None and "another content" in (what_is_wrong(two) or "")


@pytest.mark.parametrize("write", [fsdp2, deepspeed])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_processes_share_the_reading(tmp_path: Path, write: Any, size: int) -> None:
    """On any number of them; each file falls to one."""
    path = write(tmp_path / "last.ckpt")
    assert all(what_is_wrong(path, rank, size) is None for rank in range(size))
    for name in files_of(path):
        flip(path / name, 10)
        assert sum(what_is_wrong(path, rank, size) is not None for rank in range(size)) == 1
        flip(path / name, 10)


def test_each_process_vouches_for_what_it_wrote(tmp_path: Path) -> None:
    path = deepspeed(tmp_path / "last.ckpt")
    first, second = (entries(path, rank, 2) for rank in range(2))
    assert list(second) == ["checkpoint/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"] and len(first) == 3
    assert read_manifest(path) == first | second


@pytest.mark.parametrize("write", [fsdp2, deepspeed])
def test_folders_of_earlier_releases_are_compared_with_the_crc_of_their_archives(tmp_path: Path, write: Any) -> None:
    path = write(tmp_path / "last.ckpt", manifest=False)
    assert what_is_wrong(path) is None and all(what_is_wrong(path, rank, 3) is None for rank in range(3))
    for file in [*path.rglob("*.distcp"), *path.rglob("*_states.pt")]:
        middle = file.read_bytes().index(b"\0\0\x80?" * 200) + 400  # among ones in float32
        flip(file, middle * 8)
        assert "is damaged" in (what_is_wrong(path) or ""), file
        flip(file, middle * 8)


def test_a_manifest_that_was_written_anew_by_hand_is_one(tmp_path: Path) -> None:
    """It guards against accidents: who means harm can write both, and what he can do is bounded by `restricted`."""
    path = fsdp2(tmp_path / "last.ckpt")
    (path / MANIFEST).write_text(json.dumps({"files": {}, "xxh3_64": "0"}))
    assert MANIFEST in (what_is_wrong(path) or "")
    for content in ("", "[]", "{}", '{"files": 3, "xxh3_64": 4}', "nonsense", '{"files": {"a": 1}}'):
        (path / MANIFEST).write_text(content)
        assert MANIFEST in (what_is_wrong(path) or "")
