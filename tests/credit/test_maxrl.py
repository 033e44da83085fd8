"""MaxRL: the numbers of prime-rl and SkyRL, a case by hand, and a miniature that learns with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from golden_numbers import assert_close, load_pack
from learners import rewards_rise
from torch import Tensor

from lit_rl.credit.groups import group_statistics
from lit_rl.credit.maxrl import MaxRL
from lit_rl.errors import ConfigError
from lit_rl.methods.grpo import GRPO


def relative(rule: MaxRL, scores: Tensor, group: Tensor) -> Tensor:
    """Advantages of answers of one token each."""
    mask = torch.ones(len(scores), 1, dtype=torch.bool)
    return rule(scores[:, None], group, mask, has_reward=~scores.isnan(), total=lambda x: x)[:, 0]


def test_by_hand() -> None:
    """Mean 1/4: (1 - 1/4) / (1/4) = 3 for the right one and -1 for the others; alone, of mean 0 or below, and without a score: 0."""
    scores = torch.tensor([1, 0, 0, 0, 5, 0, 0, -1, -3, 1, torch.nan, 3], dtype=torch.float64)
    group = torch.tensor([0, 0, 0, 0, 1, 2, 2, 3, 3, 4, 4, 4])
    assert relative(MaxRL(), scores, group).tolist() == [3, -1, -1, -1, 0, 0, 0, 0, 0, -0.5, 0, 0.5]


@pytest.mark.golden
def test_golden(golden_dir: Path) -> None:
    """SkyRL divides by negative means too, and leaves a group of one its raw score: those rows are left out."""
    data, meta = load_pack(golden_dir, "maxrl_advantages")
    assert meta["cases"]
    for case, o in meta["cases"].items():
        scores, group = data[f"in.{case.split('.')[1]}.score"], data["in.index"]
        ours, theirs = relative(MaxRL(eps=o.get("epsilon", 0.0)), scores, group), data[f"{case}.advantages"]
        if o["impl"] == "SkyRL":
            stats, theirs = group_statistics(scores, group), theirs[:, 0]
            same = (stats.size > 1) & (stats.mean > 0)
            assert same.any()
            ours, theirs = ours[same], theirs[same]
        assert_close(ours, theirs, what=case)


def test_eps_must_not_be_negative() -> None:
    with pytest.raises(ConfigError, match="model.credit.eps=-1"):
        MaxRL(eps=-1.0)


@pytest.mark.slow
def test_a_miniature_learns(sorting_lm: Path) -> None:
    rewards_rise(sorting_lm, GRPO, credit=MaxRL())
