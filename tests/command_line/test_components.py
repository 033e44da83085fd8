"""`--model.help X` shows on one page what the components of a method take."""

from __future__ import annotations

import sys

import pytest
from test_class_change import HERE, Clip, Drawn, Method, Relative, SequenceClip, Surrogate

import cli
from lit_rl.command_line.components import asked_class, choices, components, components_page
from lit_rl.methods.flow_grpo import FlowGRPO
from lit_rl.policies.sd3 import SD3Policy


def test_options_that_take_a_class_of_this_project_are_components() -> None:
    assert components(Method)["surrogate"] is Surrogate
    found = components(FlowGRPO)
    assert "policy" in found and not {"optimizer", "lr_scheduler", "group_size", "seed"} & found.keys()
    assert SD3Policy in choices(found["policy"])


def test_each_choice_has_its_options_defaults_and_the_mark_of_the_methods_own() -> None:
    lines = components_page(Relative).splitlines()
    section = lines[lines.index("--model.surrogate: Surrogate") :]
    assert section[1:3] == [f"  {HERE}.Clip", f"    {Clip.__doc__}"]
    own = section.index(f"  {HERE}.SequenceClip (default)")
    assert section[own + 1 : own + 4] == [f"    {SequenceClip.__doc__}", "      low: 0.0003", "      high: 0.0004"]
    assert max(map(len, lines)) <= 140


def test_components_of_components_and_those_that_are_written_without_a_class() -> None:
    lines = components_page(Drawn).splitlines()
    section = lines[lines.index("--model.drawing: Drawing, by its options alone, without class_path") :]
    assert section[1:6] == ["    How it draws.", "      surrogate: null", "      temperature: 1.0", "      top_k: 0", "      greedy: true"]
    assert "--model.drawing.surrogate: Surrogate" in section


def test_what_stands_in_a_parents_signature_alone_is_found() -> None:
    """`bonus` and `surrogate` of `Method`, where `Relative` hands the rest on."""
    assert components(Relative).keys() == components(Method).keys()


@pytest.mark.parametrize("words", [[f"--model.help={HERE}.Relative"], ["--model.help", f"{HERE}.Relative"]])
def test_the_page_of_the_command_line(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["cli.py", "fit", *words])
    with pytest.raises(SystemExit) as done:
        cli.main()
    page = capsys.readouterr().out
    assert not done.value.code and page.index("--model.bonus") < page.index("--model.surrogate: Surrogate") < page.index("low: 0.0003")


def test_other_words_ask_for_no_method() -> None:
    assert asked_class(["fit", "--model.help"]) is None and asked_class(["fit", "--data.help", "toy.ToyData"]) is None
