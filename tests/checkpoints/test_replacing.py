"""A process that is killed between any two calls of the system leaves a whole checkpoint, which the next start finds."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from lit_rl.checkpoints.files import AtomicCheckpointIO, check_unused, resolve_checkpoint, what_is_missing
from lit_rl.checkpoints.replacing import atomic_file, beside, leftovers, put_in_place
from lit_rl.errors import ConfigError
from lit_rl.strategies.folders import replaced

KILLED = 9


class Alone:
    """The part of a single-process strategy that `replaced` calls."""

    is_global_zero, global_rank, world_size = True, 0, 1

    def broadcast(self, value: Any) -> Any:
        return value

    def barrier(self) -> None:
        """Nobody to wait for."""


def write_folder(path: Path, number: int) -> Path:
    with replaced(cast(Any, Alone()), path) as folder:
        folder.mkdir()
        (folder / "__0_0.distcp").write_bytes(bytes(100 + number))
        (folder / ".metadata").write_bytes(b"x")
        torch.save({"number": number}, folder / "meta.pt")
    return path


def write_file(path: Path, number: int) -> Path:
    AtomicCheckpointIO().save_checkpoint({"number": number}, path)
    return path


def write_link(path: Path, number: int) -> Path:
    path.symlink_to(write_folder(path.with_name("step=1.ckpt"), number))
    return path


def number(path: Path) -> int:
    assert what_is_missing(path) is None
    file = path / "meta.pt" if path.is_dir() else path
    return torch.load(file, weights_only=True)["number"]


def killed_at(call: int, action: Callable[[], Any]) -> bool:
    """Run `action` in a process that ends before its `call`-th change of a directory or opening of a file; False if it came to its end."""
    child = os.fork()
    if child == 0:
        left = [call]

        def watch(event: str, args: tuple[Any, ...]) -> None:
            if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir") or (event == "open" and args[1] and "w" in str(args[1])):
                left[0] -= 1
                if left[0] == 0:
                    os._exit(KILLED)

        sys.addaudithook(watch)
        try:
            action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == KILLED


WRITERS = {"folder": write_folder, "file": write_file, "link": write_link}


@pytest.mark.parametrize("before", WRITERS)
@pytest.mark.parametrize("after", ["folder", "file"])
def test_killed_between_any_two_calls(tmp_path: Path, before: str, after: str) -> None:
    """Whatever took the place of whatever: the old or the new one is `last`, and the next one leaves nothing else behind."""
    seen = set()
    for call in range(1, 100):
        folder = tmp_path / str(call)
        folder.mkdir()
        last = WRITERS[before](folder / "last.ckpt", 1)
        beside_it = {path.name for path in folder.iterdir()}
        killed = killed_at(call, lambda: WRITERS[after](last, 2))  # noqa: B023
        assert resolve_checkpoint("last", [folder]) == str(last)
        seen.add(number(last))
        WRITERS[after](last, 3)
        assert number(last) == 3 and {path.name for path in folder.iterdir()} == beside_it
        if not killed:
            break
    assert not killed and seen == {1, 2} and call > 3


def test_the_first_one_killed_before_its_place_is_taken(tmp_path: Path) -> None:
    write_folder(tmp_path / "last.ckpt", 1).rename(beside(tmp_path / "last.ckpt"))
    with pytest.raises(ConfigError, match="newest: last.ckpt"):
        check_unused([tmp_path])
    assert number(tmp_path / "last.ckpt") == 1


@pytest.mark.parametrize("state", ["old", "tmp"])
def test_what_earlier_releases_left_is_found(tmp_path: Path, state: str) -> None:
    """They removed both at the next start."""
    write_folder(tmp_path / "last.ckpt", 1).rename(tmp_path / f".last.ckpt.{state}")
    assert resolve_checkpoint("last", [tmp_path]) == str(tmp_path / "last.ckpt")


def test_the_newer_of_two_is_taken_and_torn_ones_are_not(tmp_path: Path) -> None:
    last = tmp_path / "last.ckpt"
    for state, value in (("tmp", 2), ("old", 1)):
        write_folder(last, value).rename(tmp_path / f".last.ckpt.{state}")
    torn = tmp_path / ".last.ckpt.host-1-0.new"
    shutil.copytree(tmp_path / ".last.ckpt.tmp", torn)
    (torn / "__0_0.distcp").unlink()
    assert resolve_checkpoint("last", [tmp_path]) == str(last) and number(last) == 2
    shutil.rmtree(last)
    assert resolve_checkpoint("last", [tmp_path]) == str(last) and number(last) == 1


def test_nothing_whole_is_removed_while_what_stands_there_is_torn(tmp_path: Path) -> None:
    last = write_folder(tmp_path / "last.ckpt", 1)
    shutil.copytree(last, tmp_path / ".last.ckpt.old")
    (last / "meta.pt").unlink()
    with pytest.raises(ZeroDivisionError), replaced(cast(Any, Alone()), last):
        1 / 0  # noqa: B018
    assert (tmp_path / ".last.ckpt.old").exists()
    write_folder(last, 2)
    write_folder(last, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_what_another_process_is_writing_is_left_alone(tmp_path: Path) -> None:
    """A living one of this machine, and a young one of another."""
    last = write_file(tmp_path / "last.ckpt", 1)
    living, foreign, dead = beside(last), tmp_path / ".last.ckpt.elsewhere-1-0.new", tmp_path / f".last.ckpt.{_host()}-999999999-0.new"
    for path in (living, foreign, dead):
        path.touch()
    write_file(last, 2)
    assert living.exists() and foreign.exists() and not dead.exists()
    os.utime(foreign, (1, 1))
    write_file(last, 3)
    assert not foreign.exists()


def test_a_number_of_a_process_may_be_another_ones_by_now(tmp_path: Path) -> None:
    """In a container the trainer often has the same one after a restart."""
    left = beside(tmp_path / "last.ckpt")
    left.touch()
    os.utime(left, (1, 1))
    write_file(tmp_path / "last.ckpt", 1)
    assert not left.exists()


def _host() -> str:
    return beside(Path(socket.gethostname())).name.split(".")[-2].rpartition("-")[0].rpartition("-")[0]


def test_several_write_one_file_at_a_time(tmp_path: Path) -> None:
    """Two runs in one folder met a shared temporary name."""
    errors: list[BaseException] = []

    def write(value: int) -> None:
        try:
            for _ in range(30):
                write_file(tmp_path / "last.ckpt", value)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and number(tmp_path / "last.ckpt") in range(4)
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_refused_rename_brings_back_what_stood_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    last, new = write_folder(tmp_path / "last.ckpt", 1), write_folder(tmp_path / "new", 2)
    rename = os.rename

    def refuse(source: Any, target: Any) -> None:
        if Path(source) == new:
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(OSError, match="No space"):
        put_in_place(new, last)
    assert number(last) == 1 and not leftovers(last)


def test_another_process_may_look_between_the_two_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`predict --ckpt_path last` beside a run that trains finds no `last.ckpt` for a moment, and ends what seems to be broken off."""
    last, rename = write_folder(tmp_path / "last.ckpt", 1), os.rename
    looked = []

    def look_first(source: Any, target: Any) -> None:
        if Path(source).suffix == ".new" and not looked:
            looked.append(True)
            assert resolve_checkpoint("last", [tmp_path]) == str(last)
        rename(source, target)

    monkeypatch.setattr(os, "rename", look_first)
    write_folder(last, 2)
    assert looked and number(last) == 2 and [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_an_exception_leaves_no_temporary_file(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_file(tmp_path / "a") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
