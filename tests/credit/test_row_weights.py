"""A row's own weights decide which of its scores count; what it does not ask for may be missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from fake_judge import FakeJudge, brightest
from torch import Tensor
from toy import Brightness, Metrics, ToyData, toy_method, toy_trainer

from lit_rl.credit.advantage import Advantage
from lit_rl.credit.groups import group_advantages, total_reward
from lit_rl.credit.row_weights import KEY, total_of_rows, weights_of_rows
from lit_rl.errors import ConfigError
from lit_rl.rewards.base import Reward
from lit_rl.rewards.judges.client import Judge
from lit_rl.rewards.judges.pairwise import UnifiedRewardThink
from lit_rl.types import Info


def test_rows_without_weights_have_the_runs() -> None:
    assert weights_of_rows([{"prompt": "a"}, {"prompt": "b"}], {"x": 2.0, "y": 0.0}) == {"x": 2.0}


def test_a_row_counts_what_it_names_alone() -> None:
    rows = [{"prompt": "a", "reward_weights": {"y": 0.5}}, {"prompt": "b"}]
    found = weights_of_rows(rows, {"x": 2.0, "y": 0.0, "z": 0.0})
    assert {name: torch.as_tensor(weight).tolist() for name, weight in found.items()} == {"x": [0.0, 2.0], "y": [0.5, 0.0]}


def test_a_score_that_nobody_gives_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"prompt 'a': reward_weights names \['ocr'\], but the rewards give \['x'\]"):
        weights_of_rows([{"prompt": "a", "reward_weights": {"ocr": 1.0}}], {"x": 1.0})


def test_a_row_that_counts_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="prompt 'p': reward_weights gives no score a weight"):
        weights_of_rows([{"prompt": "p", KEY: {"ocr": 0.0}}], {"ocr": 1.0})


def test_what_a_row_does_not_ask_for_may_be_missing() -> None:
    """By hand: the first group counts x, the second y; its own NaN leaves a row out, another's does not."""
    rewards = {"x": torch.tensor([1.0, 3.0, torch.nan, torch.nan]).double(), "y": torch.tensor([torch.nan, 0.0, 2.0, 6.0]).double()}
    group = torch.tensor([0, 0, 1, 1])
    weights = weights_of_rows([{"reward_weights": {"x": 1.0}}] * 2 + [{"reward_weights": {"y": 0.5}}] * 2, {"x": 1.0, "y": 1.0})
    total = total_reward(rewards, weights)
    assert total.tolist() == [1.0, 3.0, 1.0, 3.0]
    for rule in (Advantage(kind="gdpo"), Advantage(std="group")):
        found = rule(rewards, total, group, weights=weights, prompts=[], tracker=None)
        assert torch.equal(found.sign(), torch.tensor([-1.0, 1.0, -1.0, 1.0]).double())


def test_totals_of_rows_follow_their_own_weights() -> None:
    """By hand, as methods on tokens take them: 2 x of the run, 0.5 y of a row's own, and a row that lacks what it asks for."""
    rewards = {"x": torch.tensor([1.0, torch.nan, 3.0]).double(), "y": torch.tensor([torch.nan, 8.0, torch.nan]).double()}
    info = [{"prompt": "a"}, {"prompt": "b", "reward_weights": {"y": 0.5}}, {"prompt": "c", "reward_weights": {"x": 1.0, "y": 1.0}}]
    assert total_of_rows(rewards, info, {"x": 2.0, "y": 0.0}).tolist() == pytest.approx([2.0, 4.0, torch.nan], nan_ok=True)
    assert total_of_rows({"x": rewards["x"]}, info[:1] * 3, {"x": 2.0}).tolist() == pytest.approx([2.0, torch.nan, 6.0], nan_ok=True)


def test_reinforce_compares_with_the_whole_batch() -> None:
    """A group whose members are equal, and better than the others, is rewarded."""
    total, group = torch.tensor([1.0, 1.0, 0.0, 0.0]).double(), torch.tensor([0, 0, 1, 1])
    found = Advantage(kind="reinforce", eps=0.0)({"x": total}, total, group, weights={"x": 1.0}, prompts=[], tracker=None)
    torch.testing.assert_close(found, torch.tensor([1.0, 1.0, -1.0, -1.0]).double())
    assert not group_advantages(total, group).any()


class OnlyOdd(Reward):
    outputs = ("odd",)

    def score(self, media: Tensor, info: Sequence[Info]) -> Mapping[str, Tensor]:
        scores = media.double().flatten(1).mean(1) / 255
        return {"odd": scores.where(torch.tensor([int(row["prompt"]) % 2 == 1 for row in info]), torch.nan)}


class Routed(ToyData):
    def __init__(self) -> None:
        super().__init__()
        names = {0: "brightness", 1: "odd"}
        rows = [MappingProxyType({**row, "reward_weights": {names[int(row["prompt"]) % 2]: 1.0}}) for row in self.train_prompts]
        self.train_prompts: Any = rows


def test_a_run_trains_every_row_on_the_reward_that_it_asks_for(tmp_path: Path) -> None:
    metrics = Metrics()
    trainer = toy_trainer(
        tmp_path, rewards={"brightness": Brightness(), "odd": OnlyOdd()}, weights={"brightness": 1.0, "odd": 1.0}, max_failed_fraction=1.0,
        callbacks=[metrics],
    )  # fmt: skip
    trainer.fit(toy_method(), Routed())
    assert [row["trained_share"] for row in metrics.rows] == [1.0, 1.0]
    assert 0 < metrics.rows[0]["reward/odd"] < 1


@pytest.mark.parametrize(("kind", "share"), [("sum", 0.5), ("per_reward", 1.0), ("gdpo", 1.0)])
def test_a_sample_that_lacks_one_of_its_scores_trains_on_the_other(tmp_path: Path, kind: Any, share: float) -> None:
    """Half of the prompts have no score `odd`, which counts for all: they have no sum, but their brightness."""
    metrics = Metrics()
    rewards, weights = {"brightness": Brightness(), "odd": OnlyOdd()}, {"brightness": 1.0, "odd": 1.0}
    trainer = toy_trainer(tmp_path, rewards=rewards, weights=weights, max_failed_fraction=1.0, callbacks=[metrics], max_epochs=1)
    trainer.fit(toy_method(prompts_per_iteration=6, advantage=Advantage(kind=kind)), ToyData())
    assert metrics.rows[0]["trained_share"] == share and metrics.rows[0]["nan_ratio"] == 0.5


def test_pairs_are_judged_over_http_in_groups_that_micro_batches_cut(tmp_path: Path) -> None:
    """Groups of four in micro-batches of six: two of them are cut. Win rates of a group average one half; the method learns from them."""
    metrics = Metrics()
    with FakeJudge(brightest) as judge:
        think = UnifiedRewardThink(Judge(urls=judge.url, timeout_s=60.0))
        toy_trainer(tmp_path, rewards={"think": think}, callbacks=[metrics], max_epochs=1).fit(toy_method(), ToyData())
    assert len(judge.asked) == 4 * 6 and metrics.rows[0]["reward/unifiedreward_think"] == pytest.approx(0.5)
    assert metrics.rows[0]["reward/think/prompt_tokens"] == 24 * 7 and 0 <= metrics.rows[0]["reward/think/first_wins"] <= 1
