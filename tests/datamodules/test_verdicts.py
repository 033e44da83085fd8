"""Findings about rows are kept between starts, and seen to be out of date whatever changes."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from forked import ended, forked
from text_rows import attached, jsonl, parquet

from datamodules import text, text_files, verdicts
from datamodules.mixed import PromptsAndPairs
from datamodules.pairs import PreferencePairs
from datamodules.prompts_text import TextPrompts
from datamodules.supervised import SupervisedText
from datamodules.text import TextData
from lit_rl.errors import ConfigError
from lit_rl.miniatures.lm import build_lm
from lit_rl.policies.causal_lm import CausalLM
from lit_rl.types import Info

ROW = {"prompt": "ab", "response": "c", "chosen": "c", "rejected": "d"}
LONG = {**ROW, "prompt": "abcdefghij"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_lm(tmp_path_factory.mktemp("lm"), hidden=32)


@pytest.fixture
def looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Every look at a row: `read` for its fields, `tokens` for its ids."""
    seen: list[str] = []
    problems, judge = text_files.row_problems, TextData._judge
    monkeypatch.setenv("LIT_RL_CACHE", str(tmp_path / "cache"))
    for module in (verdicts, text):
        monkeypatch.setattr(module, "WORTH", 1)
    monkeypatch.setattr(text_files, "row_problems", lambda rows: seen.append("read") or problems(rows))
    monkeypatch.setattr(TextData, "_judge", lambda self, rows, share: seen.append("tokens") or judge(self, rows, share))
    yield seen


def start(make: Callable[..., TextData], path: str, policy: CausalLM, **options: Any) -> list[str]:
    """The rows that a run sees, and its longest ones."""
    data = attached(make(train=path, **options), policy)
    return [*map(str, data.train_prompts), str(data.max_tokens)]


@pytest.mark.parametrize(
    ("make", "limit"),
    [(TextPrompts, "max_prompt_length"), (SupervisedText, "max_length"), (PreferencePairs, "max_length"), (PromptsAndPairs, "max_length")],
)
@pytest.mark.parametrize("write", [jsonl, parquet])
def test_the_second_start_looks_at_no_row(
    model: Path, tmp_path: Path, looks: list[str], make: Callable[..., TextData], limit: str, write: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / ("x.parquet" if write is parquet else "x.jsonl"), ROW, LONG, ROW)
    options: dict[str, Any] = {limit: 8} | ({"filter_overlong_prompts": True} if make is TextPrompts else {})
    first = start(make, path, CausalLM(str(model)), **options)
    told = [record.message for record in caplog.records]
    assert len(first) == 3 and looks == ["read", "tokens"]
    with caplog.at_level(logging.INFO):
        assert start(make, path, CausalLM(str(model)), **options) == first and looks == ["read", "tokens"]
    assert any("1 of 3 rows left out" in record.message for record in caplog.records[len(told) :]), "what is left out is told each time"


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "template": lambda run: run["policy"].update(chat_template="{{ messages[0].content }}"),
    "arguments of the template": lambda run: run["policy"].update(chat_template_kwargs={"enable_thinking": False}),
    "an option": lambda run: run["data"].update(max_prompt_length=11),
    "the limit": lambda run: run["data"].update(max_train=2),
    "chat": lambda run: run["data"].update(chat=True),
    "the file's name": lambda run: run.update(path=str(Path(run["path"]).rename(Path(run["path"]).with_stem("y")))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_is_looked_at_again(model: Path, tmp_path: Path, looks: list[str], change: str) -> None:
    run: dict[str, Any] = {"path": jsonl(tmp_path / "x.jsonl", ROW, LONG, ROW), "policy": {}, "data": {"max_prompt_length": 12}}
    start(TextPrompts, run["path"], CausalLM(str(model)), **run["data"])
    looks.clear()
    CHANGES[change](run)
    start(TextPrompts, run["path"], CausalLM(str(model), **run["policy"]), **run["data"])
    assert looks[-1] == "tokens"
    looks.clear()
    start(
        TextPrompts,
        run["path"],
        CausalLM(str(model), **run["policy"]),
        **{**run["data"], "seed": 3, "eval_batch_size": 2, "shuffle": False},
    )
    assert looks == [], "what does not matter is not compared"


def test_an_edited_row_is_seen_at_the_same_time_and_size(model: Path, tmp_path: Path, looks: list[str]) -> None:
    path = Path(jsonl(tmp_path / "x.jsonl", ROW, LONG, ROW))
    start(TextPrompts, str(path), CausalLM(str(model)))
    stamp, content = path.stat(), path.read_text()
    path.write_text(content.replace('"prompt": "abcdefghij"', '"promqt": "abcdefghij"'))
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (stamp.st_size, stamp.st_mtime_ns)
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"x.jsonl:2: prompt: missing or null"):
            TextPrompts(train=str(path))
    path.write_text(content)
    looks.clear()
    assert len(start(TextPrompts, str(path), CausalLM(str(model)))) == 4 and looks == []


def test_rows_that_stop_a_run_stop_the_next_one(model: Path, tmp_path: Path, looks: list[str]) -> None:
    path = jsonl(tmp_path / "x.jsonl", ROW, LONG)
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"x.jsonl:2: prompt: has 10 tokens"):
            start(TextPrompts, path, CausalLM(str(model)), max_prompt_length=8)
    assert looks == ["read", "tokens", "tokens"]


@pytest.mark.parametrize("place", ["a file", "", "broken"])
def test_a_start_needs_no_folder_for_findings(
    model: Path, tmp_path: Path, looks: list[str], place: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = jsonl(tmp_path / "x.jsonl", ROW)
    if place == "broken":
        start(TextPrompts, path, CausalLM(str(model)))
        for file in (kept := sorted((tmp_path / "cache").rglob("*.json"))):
            file.write_text(file.read_text()[:9])
        assert len(kept) == 2
    else:
        (tmp_path / "a file").touch()
        monkeypatch.setenv("LIT_RL_CACHE", place and str(tmp_path / place))
    looks.clear()
    with caplog.at_level(logging.INFO):
        assert len(start(TextPrompts, path, CausalLM(str(model)))) == 2 and looks == ["read", "tokens"]
    assert ("nothing can be kept in" in caplog.text) == (place == "a file")


class Shouted(TextPrompts):
    """A class of somebody's own, whose code may change unseen."""

    def unusable(self, info: Info) -> str | None:
        return "shouted" if str(info["prompt"]).isupper() else super().unusable(info)


class Spelled(CausalLM):
    """A policy of somebody's own."""

    def encode(self, prompt: Any, **template: object) -> list[int]:
        return super().encode(prompt, **template)[:1]


def test_code_of_others_is_run_at_every_start(model: Path, tmp_path: Path, looks: list[str]) -> None:
    path = jsonl(tmp_path / "x.jsonl", ROW, {"prompt": "AB"})
    for _ in range(2):
        assert len(start(Shouted, path, CausalLM(str(model)))) == 2
        assert start(TextPrompts, path, Spelled(str(model)))[-1] == "{'prompt': 1}"
    assert looks.count("tokens") == 4


def test_small_data_leave_nothing_behind(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_RL_CACHE", str(tmp_path / "cache"))
    start(TextPrompts, jsonl(tmp_path / "x.jsonl", ROW), CausalLM(str(model)))
    assert not (tmp_path / "cache").exists()


def test_the_folder_is_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LIT_RL_CACHE": None, "XDG_CACHE_HOME": None, "HOME": "/h"}.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    assert verdicts.folder() == Path("/h/.cache/lit_rl/rows")
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    assert verdicts.folder() == Path("/c/lit_rl/rows")
    monkeypatch.setenv("LIT_RL_CACHE", "~/mine")
    assert verdicts.folder() == Path("/h/mine/rows")
    monkeypatch.setenv("LIT_RL_CACHE", "")
    assert verdicts.folder() is None


def judge(rank: int, world: int, path: str, model: str, address: str, out: str) -> None:
    import torch

    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    seen: list[int] = []
    judge = TextData._judge
    TextData._judge = lambda self, rows, share: seen.extend(share) or judge(self, rows, share)  # type: ignore[method-assign]
    result: object = start(TextPrompts, path, CausalLM(model), max_prompt_length=8, filter_overlong_prompts=True)
    try:
        start(TextPrompts, path, CausalLM(model), max_prompt_length=8)
    except ConfigError as error:
        result = [result, str(error)]
    Path(out, str(rank)).write_text(json.dumps([result, seen]))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()  # its threads must not outlive the process


def test_processes_share_the_rows_and_find_the_same(model: Path, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", LONG, *[{**ROW, "prompt": "p" * (i % 10 + 1)} for i in range(30)])
    given = (3, path, str(model), f"file://{tmp_path}/meet", str(tmp_path))
    ranks = [forked(judge, rank, *given, folder=tmp_path, log=tmp_path / "log", environment=os.environ) for rank in range(3)]
    assert [ended(rank, 200) for rank in ranks] == [0, 0, 0], (tmp_path / "log").read_text()
    found = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(3)]
    assert found[0][0] == found[1][0] == found[2][0]
    (rows, error) = found[0][0]
    assert rows == start(TextPrompts, path, CausalLM(str(model)), max_prompt_length=8, filter_overlong_prompts=True)
    assert "7 rows that cannot be used" in error and "x.jsonl:1: prompt: has 10 tokens" in error
    shares = [seen[: len(seen) // 2] for _, seen in found]
    assert sorted(i for share in shares for i in share) == list(range(31)) and max(map(len, shares)) <= 11
