"""The guides' data sets, from files as they are published to files as a run reads them."""

from __future__ import annotations

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from squares import square
from text_rows import jsonl, parquet

from datamodules.pairs import PreferencePairs
from datamodules.prompts_text import TextPrompts
from datamodules.supervised import SupervisedText
from lit_rl.prepare import main, write_parquet
from lit_rl.rewards.text.rules import RuleReward
from lit_rl.types import Answer

ROW = {"question": "Natalia sold 48 clips and half as many. How many?", "answer": "48/2 = <<48/2=24>>24.\n#### 1,072"}
PAIR = {"prompt": "\n\nHuman: hi\n\nAssistant:", "response": " x", "chosen": " Hello.", "rejected": " What?"}


def columns(path: Path) -> list[dict]:
    return pyarrow.parquet.read_table(path).to_pylist()


def test_geo3k_has_a_prompt_with_pictures_and_the_boxed_answer(tmp_path: Path) -> None:
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    raw = {"images": [[square(0, np.random.RandomState(0))]], "problem": ["<image>Find x."], "answer": ["3 \\sqrt { 2 }"]}
    features = Features({"images": List(ImageFeature()), "problem": Value("string"), "answer": Value("string")})
    (tmp_path / "raw").mkdir()
    for split in ("train", "test"):
        Dataset.from_dict(raw, features=features).to_parquet(tmp_path / "raw" / f"{split}-00000-of-00001.parquet")
    main(["geo3k", "--from", str(tmp_path / "raw"), "--out", str(tmp_path / "out")])
    (row,) = TextPrompts(train=str(tmp_path / "out/train.parquet"), val=str(tmp_path / "out/test.parquet")).train_prompts
    assert [part["type"] for part in row["prompt"][0]["content"]] == ["image", "text"] and len(row["images"]) == 1
    assert row["prompt"][0]["content"][1]["text"].startswith("Find x. Think") and row["reward_model"]["ground_truth"] == "3 \\sqrt{2}"
    rule = RuleReward()
    right, wrong = (Answer(f"so \\boxed{{{x}}}") for x in ("3\\sqrt{2}", "4"))
    assert rule.score([right, wrong], [row, row])["score"].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("layout", ["train.jsonl", "main/train-00000-of-00001.parquet"])
def test_gsm8k_as_the_guide_writes_it(tmp_path: Path, layout: str, capsys: pytest.CaptureFixture[str]) -> None:
    write = jsonl if layout.endswith("jsonl") else parquet
    write(tmp_path / "raw" / layout, ROW, ROW)
    write(tmp_path / "raw" / layout.replace("train", "test"), ROW)
    main(["gsm8k", "--from", str(tmp_path / "raw"), "--out", str(tmp_path / "out")])
    assert capsys.readouterr().out == f"{tmp_path}/out/train.parquet: 2 rows\n{tmp_path}/out/test.parquet: 1 rows\n"
    asked = ROW["question"] + ' Let\'s think step by step and output the final answer after "####".'
    assert columns(tmp_path / "out" / "test.parquet") == [
        {
            **ROW,
            "data_source": "gsm8k",
            "prompt": [{"role": "user", "content": asked}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": "1072"},
        }
    ]
    data = TextPrompts(train=str(tmp_path / "out"))
    (row,) = data.held_out
    assert len(data.train_prompts) == 2 and RuleReward().score(["#### 1,072"], [row])["score"].tolist() == [1.0]
    assert SupervisedText(train=str(tmp_path / "out")).train_prompts[0]["response"] == ROW["answer"]


def test_hh_rlhf_as_the_guide_writes_it(tmp_path: Path) -> None:
    wanted = {key: PAIR[key] for key in ("prompt", "chosen", "rejected")}
    dialogues = {key: wanted["prompt"] + wanted[key] for key in ("chosen", "rejected")}
    main(["hh_rlhf", "--from", parquet(tmp_path / "x" / "data" / "rows.parquet", PAIR), "--out", str(tmp_path)])
    main(["hh_rlhf", "--from", jsonl(tmp_path / "test.jsonl", dialogues), "--out", str(tmp_path)])
    assert columns(tmp_path / "dpo_train.parquet") == columns(tmp_path / "dpo_val.parquet") == [wanted]
    (row,) = PreferencePairs(train=str(tmp_path / "dpo_train.parquet")).train_prompts
    assert (row["prompt"], row["chosen"], row["rejected"]) == tuple(wanted.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gsm8k", "--from", "{}/bad.jsonl"], 'bad.jsonl:2: answer: expected "#### " and a number at its end'),
        (["hh_rlhf", "--from", "{}/apart.jsonl"], "apart.jsonl:1: chosen and rejected: expected the same dialogue"),
        (["gsm8k", "--from", "{}/none.jsonl"], "no such file or folder"),
        (["gsm8k", "--from", "{}/empty"], "holds no .jsonl, .json, .parquet file"),
        (["gsm8k"], "`hf download openai/gsm8k --repo-type dataset --local-dir FOLDER`, copy the folder here and give --from FOLDER"),
        (
            ["model", "--from", "Qwen/none"],
            "`hf download Qwen/none --local-dir FOLDER`, copy the folder here and set model.policy.pretrained",
        ),
        (["model", "--from", "Qwen/none", "--hub", "modelscope"], "pip install modelscope"),
        (["model"], "model: --from names a repository, e.g. --from Qwen/Qwen2.5-7B-Instruct"),
    ],
)
def test_what_cannot_be_prepared(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    jsonl(tmp_path / "bad.jsonl", ROW, ROW | {"answer": "24"})
    jsonl(tmp_path / "apart.jsonl", {"chosen": "Human: a\n\nAssistant: b", "rejected": "Human: c\n\nAssistant: d"})
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="2"):
        main([*(part.format(tmp_path) for part in arguments), "--out", str(tmp_path / "out")])
    assert re.search(re.escape(message), capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_downloads_go_where_they_are_asked_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import huggingface_hub

    def fetched(repository: str, *, repo_type: str, local_dir: Path | None) -> str:
        folder = local_dir or tmp_path / "cache"
        jsonl(Path(folder) / "train.jsonl", ROW)
        return f"{folder}"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    main(["gsm8k", "--out", str(tmp_path / "data")])
    assert len(columns(tmp_path / "data" / "train.parquet")) == 1
    main(["model", "--from", "owner/name", "--out", str(tmp_path / "model")])
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "model") and (tmp_path / "model").is_dir()


def test_two_runs_that_write_one_file_leave_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have written their rows before the first gives the file its name."""
    path, written, write_table = tmp_path / "train.parquet", threading.Barrier(2), pyarrow.parquet.write_table

    def slowly(table: pyarrow.Table, where: object) -> None:
        write_table(table, where)
        written.wait(30)

    monkeypatch.setattr(pyarrow.parquet, "write_table", slowly)
    with ThreadPoolExecutor(2) as threads:
        for done in [threads.submit(write_parquet, [{"name": name}] * 9, path) for name in ("a", "b")]:
            done.result()
    assert columns(path) in ([{"name": "a"}] * 9, [{"name": "b"}] * 9)
    assert [file.name for file in tmp_path.iterdir()] == ["train.parquet"]
