"""Hooks of methods: what a callback defines is called, and what would not be called is an error."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import lightning as L
import pytest

from callbacks.base import RLCallback, callbacks_of, check_alone
from callbacks.ema import EMA
from lit_rl.errors import ConfigError

ROOT = Path(__file__).parent.parent.parent
OWN = {name for name in vars(RLCallback) if name.startswith("on_")}


@pytest.mark.parametrize(
    ("name", "meant"),
    [("on_rollout_ends", "on_rollout_end"), ("on_train_epoch_ends", "on_train_epoch_end"), ("on_phase_begin", "on_phase")],
)
def test_a_misspelt_hook_is_an_error_when_the_class_is_defined(name: str, meant: str) -> None:
    with pytest.raises(TypeError, match=rf"Mine\.{name} is no hook and would never be called; did you mean {meant}"):
        type("Mine", (RLCallback,), {name: lambda self, *_: None})


def test_hooks_of_lightning_of_methods_and_of_relatives_are_known() -> None:
    hooks = dict.fromkeys(["on_rollout_end", "on_train_batch_end", "on_exception", "_on_signal", "once"], lambda self, *_: None)
    mine = type("Mine", (RLCallback,), hooks)
    younger = type("Younger", (mine, EMA), hooks)
    assert all(getattr(kind, name) is hook for kind in (mine, younger) for name, hook in hooks.items())


def test_the_hooks_that_methods_call_are_those_of_the_class() -> None:
    """Name and number of arguments of every `notify(...)` in the library."""
    called: dict[str, int] = {}
    for path in (ROOT / "lit_rl").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "notify":
                names = [i for i, argument in enumerate(node.args) if isinstance(argument, ast.Constant)]
                called |= {ast.literal_eval(node.args[i]): len(node.args) - i - 1 for i in names}
    assert called == {name: len(inspect.signature(getattr(RLCallback, name)).parameters) - 3 for name in OWN}


def test_the_page_names_every_hook_with_its_arguments() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    for name in OWN:
        arguments = ", ".join([*inspect.signature(getattr(RLCallback, name)).parameters][1:])
        assert re.search(rf"`{name}\(({re.escape(arguments)}|\.\.\.)\)`", page), name


def test_one_of_a_kind() -> None:
    class Mine(EMA):
        pass

    trainer = L.Trainer(callbacks=[Mine(), EMA()], logger=False, enable_checkpointing=False, barebones=False)
    assert [type(callback) for callback in callbacks_of(trainer, EMA)] == [Mine, EMA]
    with pytest.raises(ConfigError, match="trainer.callbacks has Mine and EMA, of which a run can have one: set one"):
        check_alone(trainer, EMA, "set one")
    check_alone(trainer, Mine, "set one")
