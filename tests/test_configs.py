"""Every shipped YAML is a run that the command line accepts, and says what it is in its first line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

CONFIGS = Path(__file__).parent.parent / "configs"
RUNS = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "base")


@pytest.mark.parametrize("path", RUNS, ids=[f"{p.parent.name}/{p.stem}" for p in RUNS])
def test_run_is_accepted(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from lit_rl.lightning_cli import CLI

    monkeypatch.setattr(sys, "argv", ["cli.py", "fit", "--config", str(path), "--print_config"])
    with pytest.raises(SystemExit) as done:
        CLI()
    printed = yaml.safe_load(capsys.readouterr().out)
    assert done.value.code == 0
    assert printed["model"]["class_path"] == yaml.safe_load(path.read_text())["model"]["class_path"]


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_first_line_says_what_it_is(path: Path) -> None:
    assert path.read_text().startswith("# ") and len(path.read_text().splitlines()[0]) > 20


@pytest.mark.parametrize("path", RUNS, ids=[f"{p.parent.name}/{p.stem}" for p in RUNS])
def test_products_of_the_first_line_are_right(path: Path) -> None:
    """`a prompts x b samples = c images` in the comment is what the run does."""
    run = yaml.safe_load(path.read_text())["model"]["init_args"]
    prompts, group = run["prompts_per_iteration"], run["group_size"]
    head = "\n".join(line for line in path.read_text().splitlines()[:3] if line.startswith("#"))
    assert f"{prompts} prompts x {group} samples = {prompts * group} images" in head
