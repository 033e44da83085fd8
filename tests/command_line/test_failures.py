"""A disk, a folder or another process that ends a run is told in one sentence, with the checkpoint to go on from."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from forked import end_group, ended, forked_script
from lightning.pytorch.callbacks import ModelCheckpoint
from toy import ToyData, toy_config, toy_method, toy_trainer

from lit_rl.checkpoints.choosing import go_on
from lit_rl.checkpoints.files import AtomicCheckpointIO, resolve_checkpoint
from lit_rl.command_line.failures import what_ended

ROOT = Path(__file__).parents[2]


# ---------------------------------------------------------------------- sentences
@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(28, "No space left on device", "/a/last.ckpt"), r"^/a/last\.ckpt: No space left on device; free space there"),
        (OSError(30, "Read-only file system", "/a"), r"^/a: Read-only file system; set run.dir"),
        (PermissionError(13, "Permission denied", b"/a"), "^/a: Permission denied; set run.dir"),
        (OSError(5, "Input/output error"), "^a file: Input/output error; the disk"),
        (RuntimeError("[../gloo/transport/tcp/pair.cc:553] Connection closed by peer"), r"another process of this run has ended.*timeout"),
        (RuntimeError("Application timeout caused pair closure"), r"another process of this run has ended.*timeout"),
        (torch.distributed.DistStoreError("Timed out"), r"another process .*DistStoreError: Timed out$"),
    ],
)
def test_sentences(error: BaseException, sentence: str) -> None:
    import re

    assert re.search(sentence, what_ended(error) or "")


@pytest.mark.parametrize("error", [ValueError("x"), RuntimeError("shape mismatch"), ConnectionRefusedError(111, "refused"), OSError("odd")])
def test_mistakes_of_the_program_keep_their_traceback(error: BaseException) -> None:
    assert what_ended(error) is None


def test_a_shard_that_could_not_be_written(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    (tmp_path / "file").touch()
    with pytest.raises(BaseException) as raised:
        dcp.save({"w": torch.ones(3)}, checkpoint_id=tmp_path / "file" / "last.ckpt", no_dist=True)
    assert "Not a directory" in (what_ended(raised.value) or "")


def test_the_newest_of_all_folders_is_named(tmp_path: Path) -> None:
    assert "no complete checkpoint" in go_on([tmp_path])
    for age, name in enumerate(("a/last.ckpt", "b/last.ckpt")):
        AtomicCheckpointIO().save_checkpoint({"a": 1}, tmp_path / name)
        os.utime(tmp_path / name, (age, age))
    assert go_on([tmp_path / "a", tmp_path / "b"]).endswith(f"--ckpt_path {tmp_path / 'b/last.ckpt'}")


@pytest.mark.parametrize("lost", ["loops", "callbacks", "optimizer_states", "pytorch-lightning_version"])
def test_a_checkpoint_that_lacks_what_is_restored(tmp_path: Path, lost: str) -> None:
    """Lightning takes it apart without looking."""
    keeper = ModelCheckpoint(dirpath=tmp_path, filename="a")
    toy_trainer(tmp_path, callbacks=[keeper], enable_checkpointing=True).fit(toy_method(), ToyData())
    found = torch.load(tmp_path / "a.ckpt", weights_only=True)
    found[lost] = [3]
    AtomicCheckpointIO().save_checkpoint(found, tmp_path / "b.ckpt")
    with pytest.raises(Exception) as raised:
        toy_trainer(tmp_path, max_epochs=9).fit(toy_method(), ToyData(), ckpt_path=str(tmp_path / "b.ckpt"))
    assert "does not hold what this run restores from it" in (what_ended(raised.value) or "")


# ---------------------------------------------------------------------- disks
@pytest.mark.parametrize("allowed", [0, 1, 100, 1000, 3000, 5000])
def test_a_disk_that_is_full_at_any_byte(tmp_path: Path, allowed: int) -> None:
    """The reason, the checkpoint's own name, and what was there is untouched. torch says "unexpected pos 704 vs 598"."""
    last = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"w": torch.zeros(3)}, last)
    before, limit = last.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (allowed, limit[1]))
    try:
        with pytest.raises(OSError, match="File too large") as raised:
            AtomicCheckpointIO().save_checkpoint({"w": torch.randn(5000)}, last)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert raised.value.filename == str(last) and last.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"] and resolve_checkpoint("last", [tmp_path]) == str(last)


# ---------------------------------------------------------------------- whole runs
def start(folder: Path, *, kib: int | None = None, callbacks: Sequence[dict[str, Any]] = (), **trainer: Any) -> BaseProcess:
    run = toy_config(folder)
    run["trainer"] |= {"limit_val_batches": 0, **trainer}
    run["trainer"]["callbacks"] += callbacks
    folder.mkdir(exist_ok=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return forked_script(str(ROOT / "cli.py"), "fit", "--config", str(folder / "run.yaml"), folder=folder, kib=kib)


def last_line(folder: Path) -> str:
    return (folder / "log").read_text().strip().splitlines()[-1]


@pytest.mark.slow
def test_a_run_on_a_full_disk_ends_with_one_sentence(tmp_path: Path) -> None:
    assert ended(start(tmp_path / "run", kib=1), timeout=200) == 1
    said = (tmp_path / "run" / "log").read_text()
    assert (
        "Traceback" not in said
        and "File too large" in last_line(tmp_path / "run")
        and "no complete checkpoint" in last_line(tmp_path / "run")
    )


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_ends_or_freezes_ends_the_others(tmp_path: Path, rank: int, number: signal.Signals) -> None:
    """Within seconds, or the time that processes wait for each other."""
    impatient = {"class_path": "toy.Impatient", "init_args": {"seconds": 5}}
    process = start(tmp_path / "run", devices=2, max_epochs=100_000, strategy="ddp", callbacks=[impatient])
    try:
        until(lambda: list((tmp_path / "run/checkpoints").glob("last.ckpt")), 200)
        (child,) = [c for c in psutil.Process(process.pid).children() if "cli.py" in " ".join(c.cmdline())]
        victim, other = (child.pid, process.pid) if rank else (process.pid, child.pid)
        os.kill(victim, number)
        if rank:
            assert ended(process, timeout=120) not in (0, None)
        until(lambda: gone(other), 120)
        said = (tmp_path / "run" / "log").read_text()
        assert "Traceback" not in said and f"--ckpt_path {tmp_path / 'run/checkpoints'}/" in said, said[-6000:]
        if rank:
            until(lambda: gone(victim), 60)  # a frozen one is ended by the first
    finally:
        end_group(process)


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def until(true: Callable[[], Any], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)
