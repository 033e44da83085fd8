"""A platform for each test that asks for one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from served_platform import asked


@pytest.fixture
def platform(tmp_path: Path) -> Iterator[TestClient]:
    with asked(tmp_path) as client:
        yield client
