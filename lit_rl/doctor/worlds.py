"""Worlds of agents: the browser behind web pages."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from lit_rl.doctor.report import Finding, ok, problem
from lit_rl.envs.browser import check_packages, find_browser
from lit_rl.errors import ConfigError

PAGES = "lit_rl.envs.miniwob."
VERSION_SECONDS = 30.0


def browser(named: Sequence[str]) -> Iterator[Finding]:
    """The browser's file and version; a problem where the run has pages and there is none. named: What the run's files and options say."""
    wanted = any(PAGES in text for text in named)
    try:
        program = find_browser()
        check_packages("playwright", "miniwob")
        said = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=VERSION_SECONDS, check=True).stdout.strip()
    except (ConfigError, OSError, subprocess.SubprocessError) as error:
        yield problem("web pages", str(error)) if wanted else ok("web pages", f"only runs with {PAGES}MiniWoBs want a browser: {error}")
        return
    yield ok("web pages", f"{program}, {said or 'of an unknown version'}")


def texts(files: Sequence[str], options: Sequence[str]) -> list[str]:
    """Contents of the run's files that can be read, and its other options."""
    return [Path(file).read_text() for file in files if Path(file).is_file()] + list(options)
