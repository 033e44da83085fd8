"""The browser that runs on web pages want: found, missing, and what the doctor says then."""

from __future__ import annotations

from pathlib import Path

import pytest

from lit_rl.doctor.worlds import browser, texts
from lit_rl.envs.browser import VARIABLE


def test_a_run_on_web_pages_without_a_browser_is_a_problem_with_a_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run.yaml"
    run.write_text("model: {init_args: {worlds: {class_path: lit_rl.envs.miniwob.MiniWoBs}}}")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "none"))
    (found,) = browser(texts([str(run)], []))
    assert found.status == "problem" and "apt-get install chromium-headless-shell" in found.text and VARIABLE in found.text
    (found,) = browser(texts([str(tmp_path / "missing.yaml")], ["--model.lr", "1"]))
    assert found.status == "ok" and "only runs with lit_rl.envs.miniwob.MiniWoBs want a browser" in found.text


def test_the_version_of_the_browser_is_said_and_one_that_breaks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "browser"
    program.write_text("#!/bin/sh\necho Chromium 156\n")
    program.chmod(0o755)
    monkeypatch.setenv(VARIABLE, str(program))
    (found,) = browser([])
    assert (found.status, found.text) == ("ok", f"{program}, Chromium 156")
    program.write_text("#!/bin/sh\nexit 3\n")
    (found,) = browser(["--model.worlds=lit_rl.envs.miniwob.MiniWoBs"])
    assert found.status == "problem" and "exit status 3" in found.text
