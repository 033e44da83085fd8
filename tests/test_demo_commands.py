"""Commands of a demo run as `python` runs them: their arguments, their exit code, and nothing that stays behind."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lit_rl.demo import commands


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `cli.py` that writes its arguments, and whether the parser of runs is there already, and exits with its last argument."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cli.py").write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "Path('said').write_text(f\"{sys.argv} {__name__} {'lit_rl.command_line.run' in sys.modules}\")\n"
        "sys.left_behind = True\n"
        "raise SystemExit(int(sys.argv[-1]))\n"
    )
    return tmp_path


def test_a_command_has_its_arguments_and_changes_nothing_here(script: Path) -> None:
    before = list(sys.argv)
    assert commands.cli("fit", "--seed_everything", "0") > 0
    assert (script / "said").read_text() == "['cli.py', 'fit', '--seed_everything', '0'] __main__ True"
    assert sys.argv == before and not hasattr(sys, "left_behind")


def test_a_failure_ends_the_demo_with_its_exit_code(script: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        commands.cli("fit", "3")
    assert ended.value.code == 3
