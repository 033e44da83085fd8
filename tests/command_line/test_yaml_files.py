"""Files that YAML's readers fail on, or read otherwise than they look."""

from __future__ import annotations

from pathlib import Path

import pytest

from lit_rl.command_line.yaml_files import broken_yaml


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"trainer:\n  name: caf\xe9\n", ":2: this is not UTF-8 (byte 0xe9)"),
        ("trainer: {max_epochs: 1}\n".encode("utf-16"), ":1: this is not UTF-8 (byte 0xff)"),
        (b"trainer: {name: a\x07}\n", ": this is not YAML: unacceptable character #x0007"),
        (b"model\n", ": a run has keys such as model, data and trainer; this file holds a single value"),
        (b"- model\n", "this file holds a list"),
        (b"# nothing yet\n", "this file is empty"),
        (b"a: 1\nb:\n- c: 1\n  d: 2\n  c: 3\n", ":5: `c` stands a second time (first in line 3), which would replace it: keep one"),
    ],
)
def test_the_place_and_the_fault(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(content)
    sentence = broken_yaml(["cli.py", "fit", "--config", str(file)])
    assert sentence is not None and sentence.startswith(str(file)) and said in sentence


def test_equal_keys_of_different_mappings_and_aliases_are_fine(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("a: &shared {lr: 1}\nb: {<<: *shared, lr: 2}\nc: [*shared, {lr: 3}, {lr: 4}]\n")
    assert broken_yaml(["cli.py", "fit", "--config", str(file)]) is None
