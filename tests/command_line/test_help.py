"""`--model.help`, `--data.help` and `--trainer.callbacks.help` say something of every option of every class of ours."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import sys
from pathlib import Path

import lightning as L
import pytest
from jsonargparse import ArgumentParser

import callbacks
import cli
import datamodules
import lit_rl.methods
import lit_rl.policies
import lit_rl.rewards
import lit_rl.rollouts
from lit_rl.losses.off_policy import Correction
from lit_rl.modules.base import LitRL
from lit_rl.policies.base import Policy
from lit_rl.policies.weights.lora import LoraSettings
from lit_rl.rewards.base import Reward
from lit_rl.rollouts.base import RolloutEngine, Sampling

ROOT = Path(__file__).parents[2]
BASES = (LitRL, L.LightningDataModule, L.Callback, Policy, Reward, RolloutEngine)
PACKAGES = (callbacks, datamodules, lit_rl.methods, lit_rl.policies, lit_rl.rewards, lit_rl.rollouts)


def ours() -> list[type]:
    names = [module.name for package in PACKAGES for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
    modules = [importlib.import_module(name) for name in names if not name.endswith("__main__")]
    classes = {c for module in modules for c in vars(module).values() if inspect.isclass(c) and c.__module__ in names}
    found = {c for c in classes if issubclass(c, BASES) and not inspect.isabstract(c) and not c.__name__.startswith("_")}
    return sorted(found | {LoraSettings, Sampling, Correction}, key=lambda c: f"{c.__module__}.{c.__qualname__}")


def helps(cls: type) -> dict[str, str]:
    """The text of the help page for each option."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, "x", sub_configs=True)
    texts = {action.dest: action.help or "" for action in parser._actions if action.dest.startswith("x.")}
    return {name: re.sub(r"\((required, )?type: .*", "", text) for name, text in texts.items()}


def test_every_option_has_a_help_text() -> None:
    classes = ours()
    assert len(classes) > 60
    silent = [f"{c.__module__}.{c.__name__}: {name}" for c in classes for name, text in helps(c).items() if len(text.strip()) < 8]
    assert not silent, "\n".join(silent)


def test_the_page_of_a_class(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for option, wanted in {
        "--trainer.callbacks.help=callbacks.reward_scoring.RewardScoring": ["rewards REWARDS", "Of named scores in the total"],
        "--model.help=lit_rl.methods.grpo.GRPO": ["The ratio is clipped from below", "The ratio is clipped from above"],
    }.items():
        monkeypatch.setattr(sys, "argv", ["cli.py", "fit", option])
        with pytest.raises(SystemExit) as done:
            cli.main()
        page = capsys.readouterr()
        assert not done.value.code and all(text in " ".join(page.out.split()) for text in wanted), page.out[-2000:] + page.err[-500:]
