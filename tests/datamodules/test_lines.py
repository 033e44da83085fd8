"""Rows of text files stay on the disk and are those that a reader of the whole text would see."""

from __future__ import annotations

import json
import os
import pickle
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_rows import jsonl, parquet

from datamodules import lines
from datamodules.lines import Lines, NotJSON, json_row
from datamodules.prompts_text import TextPrompts
from datamodules.text_encoding import read_text
from lit_rl.errors import ConfigError

LETTERS = st.text(st.characters(exclude_categories=["Cs"]), max_size=9)
NUMBERS = st.one_of(st.integers(), st.integers(10**20, 10**40), st.floats(allow_nan=False), st.sampled_from([72, 72.0, 72.5, -0.0, 1e400]))
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, LETTERS, st.sampled_from(["2026-11-29", "2026-11-29T04:37:05Z", "NaN", "😀"]))
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(LETTERS, inner, max_size=3), max_leaves=8)
LINES = st.one_of(
    st.tuples(VALUES, st.booleans()).map(lambda one: json.dumps(one[0], ensure_ascii=one[1])),
    st.dictionaries(LETTERS, VALUES, max_size=4).map(lambda row: " " + json.dumps(row)),
    st.sampled_from(
        ["", "  ", "\t", "\u3000", "\x85", "{", '{"a": 1', "nul", '"\\ud83d"', "\u2028", '{"a": "\u2028"}', '{"a": 1, "a": 2}']
    ),
)
ENDS = st.sampled_from(["\n", "\r\n", "\r", "\n\ufeff", "\r\r\n"])


def known(value: object) -> object:
    """Values that differ look different: 72 and 72.0, 0.0 and -0.0, True and 1."""
    return ("NotJSON", value.reason) if isinstance(value, NotJSON) else repr(value)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(LINES, ENDS), max_size=7), st.integers(1, 60), st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]))
def test_rows_are_those_of_the_whole_text(tmp_path_factory: pytest.TempPathFactory, parts: list, block: int, encoding: str) -> None:
    path = tmp_path_factory.getbasetemp() / "x.jsonl"
    path.write_bytes("".join(line + end for line, end in parts).encode(encoding))
    expected = [(number, line) for number, line in enumerate(read_text(path).split("\n"), start=1) if line.strip()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "BLOCK", block)
        rows, texts = Lines(path, json_row), Lines(path, str)
        for seen in (list(texts), [texts[i] for i in range(len(texts))], [*texts[:2], *texts.onward(min(2, len(texts)))]):
            assert seen == [line for _, line in expected]
        assert list(texts.first(2)) == list(texts)[:2] and len(texts.first(None)) == len(texts)
        assert [rows.line(i) for i in range(len(rows))] == [number for number, _ in expected]
        for value, again, (_, line) in zip(rows, pickle.loads(pickle.dumps(rows)), expected, strict=True):
            assert known(value) == known(again)
            if not isinstance(value, NotJSON):
                assert known(value) == known(json.loads(line))
            elif "\\ud" not in line:
                with pytest.raises(json.JSONDecodeError, match=re.escape(value.reason.split("(")[1].split(" at column")[0])):
                    json.loads(line)


def test_the_last_of_many_rows_is_looked_at(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}"} for i in range(3000)]
    path = jsonl(tmp_path / "x.jsonl", *rows, '{"prompt": "broken')
    for limit in (None, 5):
        with pytest.raises(ConfigError, match=r"data.train: 1 row that .*\n  .*x.jsonl:3001: not JSON \(Unterminated string"):
            TextPrompts(train=path, max_train=limit)
    path = jsonl(tmp_path / "x.jsonl", *rows, {"answer": "no prompt"})
    with pytest.raises(ConfigError, match=r"x.jsonl:3001: prompt: missing or null"):
        TextPrompts(train=path)
    assert len(TextPrompts(train=path, max_train=5).train_prompts) == 5, "a row that nobody reads may lack fields"


@pytest.mark.parametrize("write", [jsonl, parquet])
def test_a_pickled_copy_holds_no_rows(tmp_path: Path, write: object) -> None:
    path = write(tmp_path / ("x.jsonl" if write is jsonl else "x.parquet"), *[{"prompt": "p" * 1000, "n": i} for i in range(200)])  # type: ignore[operator]
    rows = TextPrompts(train=path).train_prompts.files[0].rows  # type: ignore[attr-defined]
    assert len(copy := pickle.dumps(rows)) < 5000
    assert list(pickle.loads(copy)) == list(rows) and pickle.loads(copy)[199] == {"prompt": "p" * 1000, "n": 199}


def test_forked_processes_read_at_places_of_their_own(tmp_path: Path) -> None:
    rows = TextPrompts(train=jsonl(tmp_path / "x.jsonl", *[{"prompt": f"p{i}"} for i in range(2000)])).train_prompts
    assert rows[0]["prompt"] == "p0", "the file is open"
    children = []
    for first in (0, 1):
        if not (child := os.fork()):
            wrong = any(rows[i]["prompt"] != f"p{i}" for i in range(first, 2000, 2))
            os._exit(int(wrong))
        children.append(child)
    assert all(rows[i]["prompt"] == f"p{i}" for i in range(2000))
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_a_file_that_changes_under_a_run_is_told(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "x.txt"
    path.write_text("one\ntwo\n", encoding=encoding)
    rows = Lines(path, str)
    assert rows[1] == "two"
    os.utime(path, (1, 1))
    assert rows[1] == "two", "the same content at another time is fine"
    if encoding == "utf-8":
        path.write_text("one\n", encoding=encoding)
        with pytest.raises(ConfigError, match=r"x.txt: was changed after it had been checked"):
            rows[1]
        path.write_text("one\ntwo\n", encoding=encoding)
        assert rows[1] == "two"
    copy = pickle.dumps(rows)
    (tmp_path / "new").write_text("two\none\n", encoding=encoding)
    os.replace(tmp_path / "new", path)
    assert rows[1] == "two", "the file that was opened is still there"
    with pytest.raises(ConfigError, match="was changed after it had been checked"):
        pickle.loads(copy)[1]
