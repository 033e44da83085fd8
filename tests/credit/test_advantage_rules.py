"""The block `advantage:` of a run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lit_rl.credit.advantage import Advantage
from lit_rl.credit.groups import gdpo_advantages, group_advantages, per_reward_advantages
from lit_rl.errors import ConfigError

GROUP = torch.tensor([0, 0, 0, 1, 1, 1])
REWARDS = {"a": torch.tensor([0.0, 1.0, 0.5, 0.2, 0.2, 0.9]).double(), "b": torch.tensor([3.0, 1.0, 2.0, 0.0, 5.0, 1.0]).double()}
WEIGHTS = {"a": 1.0, "b": 0.5}
TOTAL = REWARDS["a"] + 0.5 * REWARDS["b"]


def credited(rule: Advantage) -> Tensor:
    return rule(REWARDS, TOTAL, GROUP, weights=WEIGHTS, prompts=[str(g) for g in GROUP.tolist()], tracker=rule.tracker())


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (Advantage(), group_advantages(TOTAL, GROUP)),
        (Advantage(std="group", ddof=1, eps=1e-8), group_advantages(TOTAL, GROUP, std="group", ddof=1, eps=1e-8)),
        (Advantage(kind="per_reward", std="max_group"), per_reward_advantages(REWARDS, GROUP, weights=WEIGHTS, std="max_group", eps=1e-4)),
        (Advantage(trim=0.5, std="none"), group_advantages(TOTAL, GROUP, std="none", trim=0.5)),
        (Advantage(kind="gdpo", ddof=1), gdpo_advantages(REWARDS, GROUP, weights=WEIGHTS, ddof=1, eps=1e-4)),
        (Advantage(kind="history"), group_advantages(TOTAL, GROUP, std="group")),
        (Advantage(kind="history", std="batch"), group_advantages(TOTAL, GROUP, std="batch")),
    ],
)
def test_each_kind_is_its_formula(rule: Advantage, expected: Tensor) -> None:
    """On the first update a prompt's history is its group."""
    torch.testing.assert_close(credited(rule), expected)


def test_clip() -> None:
    assert credited(Advantage(clip=0.5)).abs().max() == 0.5


@pytest.mark.parametrize(
    "settings",
    [
        dict(clip=0.0),
        dict(eps=-1.0),
        dict(kind="gdpo", std="group"),
        dict(kind="history", std="group"),
        dict(kind="history", ddof=1),
        dict(trim=1.0),
        dict(kind="gdpo", trim=0.1),
    ],
)
def test_what_a_kind_cannot_use_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"model\.advantage"):
        Advantage(**settings)
