"""Rows at once follow from memory, by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lit_rl.rollouts import room
from lit_rl.rollouts.base import Request
from lit_rl.rollouts.room import Need, Plan, plan_rows

NEED = Need(token=10, logits=100, numbers=4)


def requests(prompts: int, group: int, length: int = 6) -> list[Request]:
    return [Request([prompt] * length, (prompt, i)) for prompt in range(prompts) for i in range(group)]


def planned(asked: list[Request], memory: int, *, most: int | None = None, max_tokens: int | None = None) -> Plan:
    return plan_rows(asked, 4, need=NEED, memory=memory, most=most, max_tokens=max_tokens, device="cpu")


def test_rows_are_those_that_fit() -> None:
    """(6 + 4) tokens of 10 bytes and 100 bytes of logits are 200 bytes a row."""
    asked = requests(prompts=20, group=1)
    assert planned(asked, 1000) == Plan(5, False)
    assert planned(asked, 999) == Plan(4, False)
    assert planned(asked, 10**9) == Plan(20, False)
    assert planned(asked, 10**9, most=7) == Plan(7, False)
    assert planned(asked, 10**9, max_tokens=39) == Plan(3, False)
    assert planned(asked, 0) == Plan(1, False)
    assert planned([], 0) == Plan(1, False)


def test_prompts_are_shared_where_more_answers_fit_so() -> None:
    """Two prompts of 60 bytes, and 140 bytes for each answer: 5 rows in 820 bytes instead of 4."""
    asked = requests(prompts=2, group=10)
    assert planned(asked, 820) == Plan(5, True)
    assert planned(asked, 200 * 20) == Plan(20, False)  # all fit
    assert planned(requests(prompts=10, group=2), 820) == Plan(4, False)  # ten prompts would leave 220 bytes


def test_prompts_are_shared_where_that_saves_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """20 rows, 18 of which do not read 6 columns of 4 numbers."""
    asked = requests(prompts=2, group=10)
    for worth, shared in ((18 * 6 * 4, True), (18 * 6 * 4 + 1, False)):
        monkeypatch.setitem(room.WORTH_SHARING, "cpu", worth)
        assert planned(asked, 10**9) == Plan(20, shared)


def test_a_hosts_memory_is_that_of_its_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "LIMITS", (tmp_path / "none", tmp_path / "max"))
    whole = room.host_memory()
    assert whole > 1 << 20
    for told, found in (("max", whole), ("1048576", 1 << 20), (str(1 << 62), whole)):
        (tmp_path / "max").write_text(told + "\n")
        assert room.host_memory() == found
    assert room.memory_for_answers(torch.device("cpu"), processes=2) == whole // 8
