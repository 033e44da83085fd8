"""docs/text_data.md: its rows are rows, its runs are runs, and it names every rule."""

from __future__ import annotations

import re
from pathlib import Path

import lightning as L
import pytest
import yaml
from jsonargparse import ArgumentParser
from text_rows import jsonl

from callbacks.reward_scoring import RewardScoring
from datamodules.mixed import PromptsAndPairs
from datamodules.pairs import PreferencePairs
from datamodules.prompts_text import TextPrompts
from datamodules.supervised import SupervisedText
from lit_rl.rewards.text.rules import RULES, SOURCES

PAGE = (Path(__file__).parent.parent / "docs/text_data.md").read_text(encoding="utf-8")
SECTIONS = {part.partition("\n")[0]: part for part in PAGE.split("\n## ")[1:]}


def block(section: str, language: str) -> str:
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)[0]


@pytest.mark.parametrize("cls", [TextPrompts, SupervisedText, PreferencePairs, PromptsAndPairs])
def test_rows_and_options_of_each_kind(cls: type[L.LightningDataModule], tmp_path: Path) -> None:
    path = f"{cls.__module__}.{cls.__name__}"
    (section,) = [text for title, text in SECTIONS.items() if path in title]
    lines = block(section, "jsonl").splitlines()
    data = cls(train=jsonl(tmp_path / "x.jsonl", *lines))  # type: ignore[call-arg]
    assert len(data.train_prompts) == len(lines) >= 2  # type: ignore[attr-defined]
    parser = ArgumentParser()
    parser.add_subclass_arguments(L.LightningDataModule, "data")
    assert parser.parse_object(yaml.safe_load(block(section, "yaml"))).data.class_path == path


def test_rewards() -> None:
    section = SECTIONS["Rewards"]
    (callback,) = yaml.safe_load(block(section, "yaml"))["trainer"]["callbacks"]
    parser = ArgumentParser()
    parser.add_class_arguments(RewardScoring, "scoring")
    rewards = parser.parse_object({"scoring": callback["init_args"]}).scoring.rewards
    assert [reward.class_path.rpartition(".")[2] for reward in rewards.values()] == ["RuleReward", "FormatReward"]
    assert not [name for name in [*RULES, *SOURCES] if name not in section]
