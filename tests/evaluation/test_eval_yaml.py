"""The evaluation YAML: what the authors' reader makes of it, and errors that name file, line and key."""

import json
import re
from pathlib import Path

import pytest

from lit_rl.errors import ConfigError
from lit_rl.evaluation.sets import Item, read_sets

EQUALS = {
    "Dataset entry 0 missing required 'name' field": "{yaml}:2: entry 0 of `datasets` lacks the key `name`",
    "Dataset file not found: gone.csv (specified in 'a' entry of eval_nofile.yaml)": "{yaml}:3: there is no file gone.csv (entry 'a')",
    "Missing 'datasets' key in config file: eval_nokey.yaml": "{yaml}:1: the key `datasets` is missing; found sets",
    "'datasets' must be a list in config file: eval_notlist.yaml": "{yaml}:1: `datasets` must be a list",
}
"""Our sentence for each of the authors'."""


@pytest.mark.golden
def test_sets_and_errors_are_the_authors(golden_dir: Path) -> None:
    told = json.loads((golden_dir / "deepgen/eval_yaml.json").read_text())
    scale, shift = re.findall(r"\d+", told["seed_rule"])[:2]
    for case in told["cases"]:
        file, expected = golden_dir / "deepgen/dataset" / case["inputs"]["yaml"], case["outputs"]
        if isinstance(expected, dict):
            with pytest.raises(ConfigError) as raised:
                read_sets(file, lenient=True)
            assert EQUALS[expected["message"]].format(yaml=file) in str(raised.value)
            continue
        for found, wanted in zip(read_sets(file, lenient=True), expected, strict=True):
            scoring = None if found.scoring is None else [found.scoring.type, found.scoring.language]
            told_of = (found.name, found.cfg_scale, found.num_steps, found.duplicates, scoring)
            assert told_of == tuple(wanted[key] for key in ("name", "cfg_scale", "steps", "duplicates", "scoring"))
            for item, row in zip(found.items(), wanted["items"], strict=True):
                assert (item.row.prompt, item.row.index, item.duplicate) == (row["prompt"], row["index"], row["duplicate_idx"])
                assert item.seed == row["index"] * int(scale) + row["duplicate_idx"] + int(shift)
                assert item.row.metadata.items() >= row.get("metadata", {}).items()
                assert item.file == f"{row['index']}.{row['duplicate_idx']}.png"


def sets_of(folder: Path, yaml: str, **files: str) -> list:
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")
    (folder / "eval.yaml").write_text(yaml, encoding="utf-8")
    return read_sets(folder / "eval.yaml")


ENTRY = "datasets:\n- name: a\n  path: a.txt\n"


@pytest.mark.parametrize(
    ("yaml", "sentence"),
    [
        (ENTRY + "  cfg_scale: x\n", "eval.yaml:4: cfg_scale='x' must be a number of at least 0"),
        (ENTRY + "  num_inference_steps: -2\n", "eval.yaml:4: num_inference_steps=-2 must be a whole number above 0"),
        (ENTRY + "  duplicates: 0\n", "eval.yaml:4: duplicates=0 must be a whole number above 0"),
        (ENTRY + "  duplicates: true\n", "eval.yaml:4: duplicates=True must be"),
        (ENTRY + "  scoring: nothing\n", "eval.yaml:4: scoring='nothing' names no judge: unigenbench/en or unigenbench/zh"),
        (ENTRY + "  scoring: unigenbench/fr\n", "eval.yaml:4: scoring='unigenbench/fr' names no judge"),
        (ENTRY + "  duplicate: 2\n", "eval.yaml:4: a set has no key `duplicate`; did you mean duplicates?"),
        (ENTRY + "  path: b.txt\n", "eval.yaml:4: `path` stands a second time (first in line 3)"),
        (ENTRY + "- name: a\n  path: a.txt\n", "eval.yaml:4: the name 'a' stands twice"),
        (ENTRY.replace("name: a", "name: ../a"), "eval.yaml:2: name='../a' names a folder"),
        (ENTRY + "  scoring: unigenbench\n", "a.txt:1: a judge needs `sub_dims` with 'Testpoints'"),
        ("datasets:\n- a.txt\n", "eval.yaml:2: entry 0 of `datasets` must have the keys name and path"),
        ("datasets: [\n", "eval.yaml:2: this is not YAML"),
        ("", "eval.yaml:1: the key `datasets` is missing; found nothing"),
    ],
)
def test_what_cannot_be_meant_is_told_with_its_line(tmp_path: Path, yaml: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        sets_of(tmp_path, yaml, a__txt="a cat\n")


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.jsonl", '{"prompt": "x"}\n{"tag": 1}\n', "a.jsonl:2: `prompt` (or `caption`) must be a text"),
        ("a.jsonl", "{\n", "a.jsonl:1: not JSON"),
        ("a.jsonl", '\n["x"]\n', "a.jsonl:2: expected an object"),
        ("a.csv", "index,prompt\n1,x\n1,y\n", "a.csv:3: index 1 stands at"),
        ("a.csv", "index,prompt\none,x\n", "a.csv:2: index='one' must be a whole number"),
        ("a.csv", "prompt\nx, y\n", "a.csv:2: more cells than the header's prompt"),
        ("a.txt", "\n\n", "a.txt: holds no prompts"),
        ("a.doc", "x", "a.doc: evaluation sets are .csv, .txt, .jsonl, .parquet files"),
        (
            "a.jsonl",
            '{"prompt": "x", "key": "a/b"}\n{"prompt": "y", "key": "a b"}\n',
            "a.jsonl:2: its image would be a_b.0.png, as that of",
        ),
    ],
)
def test_a_row_that_is_no_prompt_is_told_with_its_line(tmp_path: Path, name: str, text: str, sentence: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        sets_of(tmp_path, ENTRY.replace("a.txt", name))


@pytest.mark.parametrize(
    ("dims", "sentence"),
    [
        ("{", "sub_dims is not JSON"),
        ('{"Testpoints": "Style"}', "'考点' in sub_dims must be a list of names; found the keys Testpoints"),
        ('{"考点": ["风格", "属性-数量"], "Testpoint Description": ["x"]}', "sub_dims describes 1 of 2 testpoints"),
    ],
)
def test_testpoints_that_a_judge_could_not_be_asked_are_told(tmp_path: Path, dims: str, sentence: str) -> None:
    row = json.dumps({"prompt": "x", "sub_dims": dims})
    with pytest.raises(ConfigError, match=re.escape(f"a.jsonl:1: {sentence}")):
        sets_of(tmp_path, ENTRY.replace("a.txt", "a.jsonl") + "  scoring: {type: unigenbench, language: zh}\n", a__jsonl=row)


def test_chinese_sets_have_testpoints_of_their_own_key(tmp_path: Path) -> None:
    """Upstream finds none in them and divides 0 by 0."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    dims = json.dumps({"考点": ["风格"], "考点对应描述": ["水墨"]}, ensure_ascii=False)
    pq.write_table(pa.table({"prompt": ["三只鸟"], "sub_dims": [dims], "key": [None]}), tmp_path / "a.parquet")
    (one,) = sets_of(tmp_path, ENTRY.replace("a.txt", "a.parquet") + "  scoring: unigenbench/zh\n")
    assert one.testpoints(one.rows[0]) == (["风格"], ["水墨"]) and one.items() == [Item(one.rows[0], 0)]
    assert one.items()[0].file == "0.0.png"
