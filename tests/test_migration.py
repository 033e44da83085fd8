"""Every key that docs/migration.md sends people to exists."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import lightning as L
import pytest

from callbacks.ema import EMA
from datamodules.prompts import PromptFiles
from lit_rl.credit import Advantage
from lit_rl.methods.flow_grpo import FlowGRPO
from lit_rl.policies.flux import FluxPolicy
from lit_rl.rewards.client import HTTPReward

PAGE = Path(__file__).parent.parent / "docs" / "migration.md"
ROOMS = {
    "model.init_args.policy.init_args": FluxPolicy,
    "model.init_args.optimizer.init_args": __import__("torch").optim.AdamW,
    "model.init_args.advantage": Advantage,
    "model.init_args": FlowGRPO,
    "data.init_args": PromptFiles,
    "trainer": L.Trainer,
}


def parameters(cls: type) -> set[str]:
    return {p for c in inspect.getmro(cls) if "__init__" in vars(c) for p in inspect.signature(c.__init__).parameters}


def keys() -> list[str]:
    table = PAGE.read_text().split("## Commands")[0]
    rows = [line.split("|")[2] for line in table.splitlines() if line.startswith("| `--")]
    return sorted({key for cell in rows for key in re.findall(r"`([\w.]+)`", cell)})


@pytest.mark.parametrize("key", keys())
def test_key_exists(key: str) -> None:
    if key in ("seed_everything", "model.class_path"):
        return
    room = next(room for room in ROOMS if key.startswith(room + "."))
    assert key.removeprefix(room + ".") in parameters(ROOMS[room])


def test_the_page_names_enough_and_only_real_arguments() -> None:
    assert len(keys()) > 25
    text = PAGE.read_text()
    assert {"decay", "update_interval"} <= parameters(EMA) and {"urls", "route"} <= parameters(HTTPReward)
    for path in re.findall(r"`((?:lit_rl|callbacks)(?:\.\w+)+)", text):
        module = path.rpartition(".")[0] if path.rpartition(".")[2][0].isupper() else path
        assert (PAGE.parent.parent / f"{module.replace('.', '/')}.py").is_file(), path
