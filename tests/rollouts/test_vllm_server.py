"""The commands that the documentation gives are those that the tests of vLLM run; a server that ends is told of at once."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from rollouts.vllm_server import COMMAND, ROOT, ServerProcess, documented_commands, filled_in, free_port, vllm

GLOBS = ["*.md", "docs/*.md", "configs/**/*.yaml"]
PAGES = [str(path.relative_to(ROOT)) for names in GLOBS for path in ROOT.glob(names)]


def test_every_command_in_docs_and_configs_is_one_that_the_tests_run() -> None:
    known = set(documented_commands().values())
    found = {(page, hit.group().strip()) for page in PAGES for hit in COMMAND.finditer((ROOT / page).read_text(encoding="utf-8"))}
    assert {command for _, command in found} == known, {page for page, command in found if command not in known}
    assert all("--dtype DTYPE" in command for command in known), "without it vLLM serves a float32 model in bfloat16"


def test_a_command_is_run_as_it_stands_but_for_the_words_in_capitals(tmp_path: Path) -> None:
    for kind, command in documented_commands().items():
        started = vllm(kind, tmp_path, tmp_path / "log")
        given = filled_in(command, MODEL=str(tmp_path), DTYPE="float32", RANK="8")
        assert started.command[1 : len(given.words)] == given.words[1:] and given.words[0] == "python"
        assert given.environment.items() <= started.environment.items() and given.environment
        assert not [word for word in given.words if word.isupper()]


def test_a_server_that_ends_is_told_of_at_once_with_its_last_lines(tmp_path: Path) -> None:
    program = "print('started'); print('no such model: nowhere'); raise SystemExit(3)"
    server = ServerProcess([sys.executable, "-c", program], {}, free_port(), tmp_path / "log")
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?s)has ended with status 3.*no such model: nowhere"):
        server.start()
    assert time.monotonic() - began < 120  # 480 s are a server's to start


def test_a_server_that_is_never_well_is_ended(tmp_path: Path) -> None:
    program = "import time; print('reading weights', flush=True); time.sleep(60)"
    server = ServerProcess([sys.executable, "-c", program], {}, free_port(), tmp_path / "log")
    with pytest.raises(RuntimeError, match=r"(?s)not healthy after 1 s.*reading weights"):
        server.start(seconds=1.0)
    assert server.process.poll() is not None
