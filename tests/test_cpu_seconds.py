"""What a test costs is told with the processes that it starts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from cpu_seconds import CpuSeconds

TESTS = """
import multiprocessing, time

def burn(seconds):
    while time.process_time() < seconds:
        pass

def test_cheap():
    pass

def test_itself():
    burn(time.process_time() + 0.1)

def test_by_a_child():
    child = multiprocessing.get_context("fork").Process(target=burn, args=(0.3,))
    child.start()
    child.join()
"""


def test_the_dearest_come_first_with_what_their_processes_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner/test_burning.py").write_text(TESTS)
    options = ["-c", "/dev/null", "--rootdir", str(tmp_path), "-p", "no:cacheprovider", "-p", "no:xdist"]
    assert pytest.main([*options, str(tmp_path / "inner")], plugins=[CpuSeconds()]) == 0
    said = capsys.readouterr().out
    rows = re.findall(r"^ +(\d+\.\d)  (\S+)$", said, re.MULTILINE)
    file = "inner/test_burning.py"
    assert [name for _, name in rows] == ["inner", file, *(f"{file}::test_{name}" for name in ("by_a_child", "itself", "cheap"))]
    folder, whole, child, itself, cheap = (float(seconds) for seconds, _ in rows)
    assert child >= 0.3 and itself >= 0.1 and cheap < itself and folder == whole >= 0.4
