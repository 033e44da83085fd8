"""Rows of files: found, read from every format alike, and told apart by place when they are wrong."""

import json
import re
from pathlib import Path

import pytest
from text_rows import jsonl, parquet

from datamodules.mixed import PromptsAndPairs
from datamodules.pairs import PreferencePairs
from datamodules.prompts_text import TextPrompts
from datamodules.supervised import SupervisedText
from datamodules.text_rows import row_kind
from lit_rl.errors import ConfigError

USER = [{"role": "user", "content": "25 * 4 = ?"}]
GUIDE = [
    {"prompt": USER, "reward_model": {"style": "rule", "ground_truth": "100"}, "ability": "math"},
    {"prompt": [{"role": "user", "content": "写一个快速排序函数"}], "reward_model": {"style": "model"}, "ability": "code"},
]


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text(json.dumps(GUIDE))
    files = [
        jsonl(tmp_path / "rows.jsonl", *GUIDE),
        str(tmp_path / "list.json"),
        jsonl(tmp_path / "lines.json", *GUIDE),
        parquet(tmp_path / "rows.parquet", *GUIDE),
    ]
    seen = []
    for file in files:
        rows = [dict(row) for row in TextPrompts(train=file).train_prompts]
        stem = Path(file).stem
        assert [row.pop("id") for row in rows] == [f"{stem}-0", f"{stem}-1"] and {row.pop("data_source") for row in rows} == {stem}
        seen.append(rows)
    assert seen[0] == seen[1] == seen[2] == GUIDE
    assert seen[3][1]["reward_model"] == {"style": "model", "ground_truth": None}  # what a column of objects makes of it
    assert seen[3][0] == GUIDE[0]


def test_null_columns_are_absent_and_rows_read_only(tmp_path: Path) -> None:
    verl = {"data_source": "openai/gsm8k", "prompt": USER, "extra_info": {"index": 3}, "id": "a"}
    data = TextPrompts(train=parquet(tmp_path / "x.parquet", verl, {"prompt": USER, "note": "n"}), data_source="mine")
    first, second = data.train_prompts
    assert (first["id"], first["data_source"], "note" in first) == ("a", "openai/gsm8k", False)
    assert (second["id"], second["data_source"], "extra_info" in second) == ("x-1", "mine", False)
    with pytest.raises(TypeError):
        first["id"] = "b"  # type: ignore[index]


def test_lines_break_at_newlines_only(tmp_path: Path) -> None:
    text = "one\u2028two\x85three"
    (row,) = TextPrompts(train=jsonl(tmp_path / "x.jsonl", {"prompt": text}, "")).train_prompts
    assert row["prompt"] == text


def test_folders_patterns_and_lists(tmp_path: Path) -> None:
    for name in ("train-00001-of-00002", "train-00000-of-00002", "test"):
        parquet(tmp_path / "split" / f"{name}.parquet", {"prompt": name})
    for name in "ab":
        jsonl(tmp_path / "plain" / f"{name}.jsonl", {"prompt": name})

    def prompts(rows: object) -> list[str]:
        return [row["prompt"] for row in rows]  # type: ignore[attr-defined]

    data = TextPrompts(train=str(tmp_path / "split"))
    assert prompts(data.train_prompts) == ["train-00000-of-00002", "train-00001-of-00002"]
    assert prompts(data.held_out) == ["test"], "the folder's other split is held out"
    assert prompts(TextPrompts(train=str(tmp_path / "plain")).train_prompts) == ["a", "b"]
    assert prompts(TextPrompts(train=str(tmp_path / "*" / "*.jsonl"), max_train=1).train_prompts) == ["a"]
    both = TextPrompts(train=[str(tmp_path / "plain"), str(tmp_path / "split" / "test.parquet")])
    assert prompts(both.train_prompts) == ["a", "b", "test"]
    assert [row["id"] for row in both.train_prompts] == ["a-0", "b-1", "test-2"]


def test_rows_in_order_are_the_rows_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datamodules.parquet.Parquet.CHUNK", 3)
    files = [parquet(tmp_path / f"{name}.parquet", *[{"prompt": f"{name}{i}"} for i in range(size)]) for name, size in [("a", 7), ("b", 4)]]
    rows = TextPrompts(train=[files[0], jsonl(tmp_path / "c.jsonl", {"prompt": "c"}), files[1]], max_train=10).train_prompts
    for some in (rows, rows.select([0, 5, 8, 9]), rows[2:9]):  # type: ignore[attr-defined]
        assert [dict(row) for row in some] == [dict(some[i]) for i in range(len(some))]
    assert [row["prompt"] for row in rows][5:] == ["a5", "a6", "c", "b0", "b1"]


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ("none.jsonl", "data.train: none.jsonl: no such file or folder"),
        ("{}/*.txt", "no file that this pattern matches"),
        ("{}/a.csv", "rows are read from .jsonl, .json, .parquet"),
        ("{}/empty", "holds no .jsonl, .json, .parquet file"),
        ("{}/only_test", "is named after train: test.jsonl"),
        ("{}/blank.jsonl", "hold no rows"),
        ("{}/broken.parquet", "not a Parquet file"),
        ("{}/broken.json", "broken.json:2: not JSON"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, paths: str, message: str) -> None:
    (tmp_path / "a.csv").write_text("prompt\n")
    (tmp_path / "empty").mkdir()
    jsonl(tmp_path / "only_test" / "test.jsonl", {"prompt": "a"})
    (tmp_path / "blank.jsonl").write_text("\n\n")
    (tmp_path / "broken.parquet").write_text("PAR?")
    (tmp_path / "broken.json").write_text("[\n{]")
    with pytest.raises(ConfigError, match=re.escape(message)):
        TextPrompts(train=paths.format(tmp_path))


def test_all_problems_are_named_at_once_with_their_places(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "x.jsonl", {"prompt": "fine"}, "", "{", {"question": "?"}, [1], {"prompt": [{"role": "user"}]}, {"prompt": None}
    )
    with pytest.raises(ConfigError) as error:
        TextPrompts(train=path)
    text = str(error.value)
    for line, what in [
        (3, "not JSON"),
        (4, "prompt: missing or null; the row has ['question']"),
        (5, "expected an object"),
        (6, "prompt[0].content: expected a string, found NoneType"),
        (7, "prompt: missing or null"),
    ]:
        assert f"x.jsonl:{line}: {what}" in text
    assert text.startswith("data.train: 5 rows that cannot be used")
    many = jsonl(tmp_path / "many.jsonl", *[{"prompt": ""}] * 14)
    with pytest.raises(ConfigError, match=r"14 rows(?s:.*)many.jsonl:10: prompt: is empty(?s:.*)\.\.\. and 4 more$"):
        TextPrompts(train=many)
    with pytest.raises(ConfigError, match=r"p.parquet: row 2: reward_model: expected an object such as"):
        TextPrompts(train=parquet(tmp_path / "p.parquet", {"prompt": "a"}, {"prompt": "b", "reward_model": "rule"}))


ANSWER = [{"role": "assistant", "content": "100"}]


@pytest.mark.parametrize(
    ("row", "prompt", "response"),
    [
        ({"messages": [*USER, *ANSWER]}, USER, "100"),
        ({"messages": [*USER, *ANSWER, *USER], "prompt": "p", "response": "r"}, USER, "100"),
        ({"messages": None, "prompt": "p", "response": "r", "question": "q", "answer": "a"}, "p", "r"),
        ({"prompt": "p", "question": "q", "answer": "a"}, "q", "a"),
        ({"prompt": USER, "response": ANSWER}, USER, "100"),
    ],
)
def test_what_a_supervised_row_says(tmp_path: Path, row: dict, prompt: object, response: str) -> None:
    (info,) = SupervisedText(train=jsonl(tmp_path / "x.jsonl", row)).train_prompts
    assert (info["prompt"], info["response"]) == (prompt, response)
    assert ("messages" in info) == (row.get("messages") is not None)


def test_keys_by_name_win(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", {"messages": [*USER, *ANSWER], "q": "q", "a": "a"})
    (info,) = SupervisedText(train=path, prompt_key="q", response_key="a", chat=True).train_prompts
    assert info["prompt"] == [{"role": "user", "content": "q"}] and info["response"] == "a" and "messages" not in info
    with pytest.raises(ConfigError, match="go together"):
        SupervisedText(train=path, prompt_key="q")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p"}, r"expected messages, or prompt and response, or question and answer \(or name data.prompt_key .* \['prompt'\]"),
        ({"messages": USER}, r"messages: expected a user's message and an answer by role assistant, found roles \['user'\]"),
        ({"prompt": "p", "response": USER}, "response: expected a text or one message by role assistant"),
    ],
)
def test_supervised_rows_that_say_nothing(tmp_path: Path, row: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SupervisedText(train=jsonl(tmp_path / "x.jsonl", row))


GOOD, BAD = [{"role": "assistant", "content": "good"}], [{"role": "assistant", "content": "bad"}]
ASKED = [{"role": "user", "content": "p"}]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p", "chosen": "good", "rejected": ""}, ("p", "good", "")),
        ({"prompt": ASKED, "chosen": "good", "rejected": "bad"}, (ASKED, GOOD, BAD)),
        ({"prompt": "p", "chosen": GOOD, "rejected": BAD}, (ASKED, GOOD, BAD)),
        ({"prompt": ASKED, "chosen": ASKED + GOOD, "rejected": ASKED + BAD}, (ASKED, GOOD, BAD)),
        ({"chosen": ASKED + GOOD, "rejected": ASKED + BAD}, (ASKED, GOOD, BAD)),
    ],
)
def test_what_a_preference_says(tmp_path: Path, row: dict, expected: tuple) -> None:
    (info,) = PreferencePairs(train=jsonl(tmp_path / "x.jsonl", row)).train_prompts
    assert (info["prompt"], info["chosen"], info["rejected"]) == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "chosen": "good", "rejected": None}, "rejected: missing or null"),
        ({"chosen": "good", "rejected": "bad"}, "prompt: missing or null; only when"),
        ({"chosen": ASKED + GOOD, "rejected": GOOD}, "begin differently"),
        ({"chosen": ASKED + GOOD, "rejected": ASKED + GOOD}, "do not differ"),
        (
            {"prompt": ASKED, "chosen": ASKED, "rejected": "bad"},
            r"chosen: expected an answer by role assistant after the prompt, found roles \[\]",
        ),
    ],
)
def test_preferences_that_say_nothing(tmp_path: Path, row: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PreferencePairs(train=jsonl(tmp_path / "x.jsonl", row))


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"prompt": USER}, "self_play"),
        ({"prompt": USER, "self_play": True, "chosen": None}, "self_play"),
        ({"prompt": "p", "chosen": "good", "rejected": "bad", "self_play": True}, "pair"),
        ({"prompt": "p", "self_play": False}, "self_play: is false, so the row needs chosen and rejected"),
        ({"prompt": "p", "chosen": "good"}, "rejected: missing or null beside chosen"),
        ({"prompt": "p", "self_play": "yes"}, "self_play: expected true or false, found 'yes'"),
    ],
)
def test_mixed_rows_are_told_apart(tmp_path: Path, row: dict, kind: str) -> None:
    path = jsonl(tmp_path / "x.jsonl", row)
    if kind in ("pair", "self_play"):
        (info,) = PromptsAndPairs(train=path).train_prompts
        assert info["kind"] == row_kind(row) == kind
    else:
        with pytest.raises(ConfigError, match=f"x.jsonl:1: {re.escape(kind)}"):
            PromptsAndPairs(train=path)
