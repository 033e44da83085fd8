"""A miniature on disk, and a server that was started on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_server import FakeServer
from rough_lm import roughen
from toy_text import model_folder
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = model_folder(tmp_path_factory.mktemp("lm") / "base")
    lm = AutoModelForCausalLM.from_pretrained(folder)
    roughen(lm)
    lm.save_pretrained(folder)
    return folder


@pytest.fixture
def server(base: Path) -> Iterator[FakeServer]:
    with FakeServer(base) as running:
        yield running
