"""A platform for each test that asks for one, and a repository whose runs are stand-ins."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from served_platform import asked

from lit_rl.platform.settings import REPOSITORY

STAND_IN = Path(__file__).with_name("stand_in_run.py")


@pytest.fixture
def platform(tmp_path: Path) -> Iterator[TestClient]:
    with asked(tmp_path) as client:
        yield client


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository whose `cli.py` stands in for the real one."""
    root = tmp_path / "repository"
    root.mkdir()
    shutil.copy(STAND_IN, root / "cli.py")
    (root / "configs").symlink_to(REPOSITORY / "configs")
    (root / "rows.jsonl").write_text('{"prompt": "a"}\n' * 64)
    (root / "model").mkdir()
    return root
