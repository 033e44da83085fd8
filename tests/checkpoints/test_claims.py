"""One run at a time writes into a folder; who comes second is told, and a killed one leaves no lock."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lit_rl.checkpoints.claims import claim, lock_file, release
from lit_rl.errors import ConfigError

HOLD = """
import sys
from lit_rl.checkpoints.claims import claim
claim([sys.argv[1]])
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def held(tmp_path: Path):
    """A folder that another process keeps."""
    folder = tmp_path / "checkpoints"
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield folder, process
    process.kill()
    process.communicate()


def test_a_second_run_is_told_whose_the_folder_is(held: tuple[Path, subprocess.Popen[str]]) -> None:
    folder, process = held
    for name in (folder, folder / "..", folder.parent / "." / folder.name):
        if name.resolve() == folder:
            with pytest.raises(ConfigError, match=rf"process {process.pid} on .* writes its checkpoints to {folder}: wait"):
                claim([name])
    assert list(folder.iterdir()) == []


def test_the_lock_ends_with_its_holder(held: tuple[Path, subprocess.Popen[str]]) -> None:
    folder, process = held
    process.send_signal(signal.SIGKILL)
    process.wait()
    claim([folder, folder])
    claim([folder])
    release()
    assert not lock_file(folder).exists()


def test_children_do_not_hold_it(tmp_path: Path) -> None:
    """A worker of a dataloader may outlive a killed run by seconds."""
    claim([tmp_path / "a"])
    child = os.fork()
    if child == 0:
        signal.pause()
    try:
        release()
        done = subprocess.run([sys.executable, "-c", HOLD, str(tmp_path / "a")], input="", capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.parametrize("place", ["/proc/1/checkpoints", "a-file/checkpoints", "/sys/kernel/checkpoints"])
def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "a-file").touch()
    with pytest.raises(ConfigError, match="checkpoints cannot be written to .*; set run.dir"):
        claim([tmp_path / place])
