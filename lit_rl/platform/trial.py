"""The files of a run are parsed as the command line parses them, by another process, before its job waits for GPUs."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path

from lit_rl.platform.plan import Plan

SECONDS = 120.0
"""Time that the parse may take; of a machine that needs longer, the run itself tells what is wrong."""


def check_values(plan: Plan, folder: Path, root: Path, environment: Mapping[str, str]) -> None:
    """Note what the command line says against the written `job.yaml`, such as a value of the wrong type. Nothing is built from it."""
    argv = [*plan.argv(folder, root, None), "--print_config"]
    try:
        ended = subprocess.run(argv, cwd=root, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return
    if ended.returncode:
        lines = [line for line in ended.stderr.splitlines() if line.strip()] or [f"exit code {ended.returncode}"]
        said = next((line for line in lines if line.startswith("error: ")), lines[-1])
        plan.problem("overrides", said.removeprefix("error: ").replace(f"{folder}/", ""))
