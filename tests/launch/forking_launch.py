"""`python -m lit_rl.launch` whose processes are forked from it, which saves the seconds of their imports: torchrun's own options."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

from lit_rl.launch import torchrun
from lit_rl.launch.__main__ import main

command = torchrun.command


def forking(nodes: Any, run: Sequence[str], **options: Any) -> list[str]:
    words = command(nodes, run, **options)
    place = words.index(str(torchrun.ROOT / "cli.py"))
    return [*words[:place], "--start-method", "fork", "--run-path", *words[place:]]


if __name__ == "__main__":
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # it may have children
    with patch.object(torchrun, "command", forking):
        code = main()
    raise SystemExit(code)
