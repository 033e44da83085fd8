"""Prompts from files, and the order in which a run sees them."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from datamodules import prompts, verdicts
from datamodules.base import PromptDataModule
from datamodules.prompts import PromptFiles, read_prompts
from lit_rl.errors import ConfigError
from lit_rl.seeding import generator


def attached(data: PromptFiles, *, rank: int = 0, world: int = 1) -> PromptFiles:
    data.trainer = SimpleNamespace(world_size=world, global_rank=rank, lightning_module=None)  # type: ignore[assignment]
    return data


def write(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def test_text_file_skips_blank_lines(tmp_path: Path) -> None:
    rows = read_prompts(Path(write(tmp_path / "p.txt", "a cat", "", "  an owl  ")))
    assert [row["prompt"] for row in rows] == ["a cat", "an owl"]


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_only_a_new_line_ends_a_prompt(tmp_path: Path, name: str) -> None:
    text = "one\u2028two\x85three"
    line = text if name.endswith("txt") else json.dumps({"prompt": text}, ensure_ascii=False)
    assert [row["prompt"] for row in read_prompts(Path(write(tmp_path / name, line)))] == [text]


def test_jsonl_keeps_what_rewards_need(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", json.dumps({"caption": "a sign", "target": "EXIT"}))
    (row,) = read_prompts(Path(path), prompt_key="caption")
    assert row["prompt"] == "a sign" and row["target"] == "EXIT"
    with pytest.raises(TypeError):
        row["target"] = "ENTER"  # type: ignore[index]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"', r"p\.jsonl:2: not JSON"),
        ('["a"]', r"p\.jsonl:2: expected an object .* found list"),
        ('{"text": "a"}', r"p\.jsonl:2: key 'prompt' must be a non-empty string; found \['text'\]"),
        ('{"prompt": "  "}', r"p\.jsonl:2: key 'prompt'"),
    ],
)
def test_errors_name_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "p.jsonl", '{"prompt": "fine"}', line)
    with pytest.raises(ValueError, match=message):
        PromptFiles(path)


def test_missing_file_wrong_suffix_and_empty_file(tmp_path: Path) -> None:
    for name, message in {"no.txt": "no such file", "p.csv": r"read from \.txt or \.jsonl", "empty.txt": "holds no prompts"}.items():
        if not name.startswith("no"):
            write(tmp_path / name, "")
        with pytest.raises(ValueError, match=message):
            PromptFiles(str(tmp_path / name))


def test_folder_with_both_splits(tmp_path: Path) -> None:
    write(tmp_path / "train.txt", "a", "b")
    write(tmp_path / "test.jsonl", '{"prompt": "c"}')
    data = PromptFiles(str(tmp_path))
    assert [r["prompt"] for r in data.train_prompts] == ["a", "b"] and [r["prompt"] for r in data.held_out] == ["c"]
    (tmp_path / "test.jsonl").unlink()
    with pytest.raises(ValueError, match=r"needs test\.txt or test\.jsonl or val\.txt or val\.jsonl; found \['train.txt'\]"):
        PromptFiles(str(tmp_path))


def test_rows_to_score_say_where_they_stand(tmp_path: Path) -> None:
    train, val = write(tmp_path / "train.txt", "a", "", "b", "c"), write(tmp_path / "val.jsonl", '{"prompt": "d", "target": "D"}')
    data = PromptFiles(train, val, max_train=2)
    rows = [{"prompt": "a", "where": f"{train}:1"}, {"prompt": "b", "where": f"{train}:3"}]
    held_out = [{"prompt": "d", "target": "D", "where": f"{val}:1"}]
    assert list(data.rows_to_score("fit")) == rows + held_out and list(data.rows_to_score("validate")) == held_out
    assert "where" not in data.train_prompts[0]


@given(n=st.integers(1, 9), count=st.integers(1, 7), seed=st.integers(0, 3))
def test_every_prompt_comes_once_before_any_comes_again(tmp_path_factory: Any, n: int, count: int, seed: int) -> None:
    path = tmp_path_factory.mktemp("prompts") / "p.txt"
    data = PromptFiles(write(path, *map(str, range(n))), seed=seed)
    stream = [row["prompt"] for iteration in range(3 * n) for row in data.prompts(iteration, count)]
    for start in range(0, len(stream) - n + 1, n):
        assert len(set(stream[start : start + n])) == n
    again = PromptFiles(str(path), seed=seed)
    assert [row["prompt"] for row in again.prompts(2 * n, count)] == stream[2 * n * count : (2 * n + 1) * count]


@pytest.mark.parametrize("shuffle", [True, False])
@given(n=st.integers(1, 9), calls=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 12), st.integers(0, 1)), max_size=6))
def test_the_order_is_that_of_the_seed_whatever_was_asked_before(shuffle: bool, n: int, calls: list[tuple[int, int, int]]) -> None:
    data = PromptDataModule([{"prompt": str(i)} for i in range(n)], shuffle=shuffle)
    for iteration, count, data.seed in calls:
        expected = []
        for k in range(iteration * count, (iteration + 1) * count):
            order = torch.randperm(n, generator=generator(data.seed, "prompts", k // n)).tolist()
            expected.append(str(order[k % n] if shuffle else k % n))
        assert [row["prompt"] for row in data.prompts(iteration, count)] == expected


def test_an_order_is_drawn_once_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    monkeypatch.setattr("datamodules.base.generator", lambda seed, name, round_: drawn.append(round_) or generator(seed, name, round_))
    data = PromptDataModule([{"prompt": str(i)} for i in range(10)])
    for iteration in range(5):
        data.prompts(iteration, 3)
    assert drawn == [0, 1]


def test_seeds_and_rounds_differ(tmp_path: Path) -> None:
    path = write(tmp_path / "p.txt", *map(str, range(50)))
    orders = {tuple(row["prompt"] for row in PromptFiles(path, seed=s).prompts(i, 50)) for s in (0, 1) for i in (0, 1)}
    assert len(orders) == 4


@pytest.mark.parametrize(("count", "world", "size"), [(5, 1, 2), (5, 2, 2), (8, 2, 2), (1, 3, 4)])
def test_evaluation_batches_cover_everything_once_in_equal_shares(tmp_path: Path, count: int, world: int, size: int) -> None:
    path = write(tmp_path / "p.txt", *map(str, range(count)))
    shares = [list(attached(PromptFiles(path, path, eval_batch_size=size), rank=r, world=world).val_dataloader()) for r in range(world)]
    assert len({tuple(len(batch) for batch in share) for share in shares}) == 1
    seen = [(int(g), row["prompt"]) for share in shares for b in share for g, row in zip(b.group, b.info) if g >= 0]
    assert seen == [(i, str(i)) for i in range(count)]


def test_a_prediction_of_nothing_is_refused(tmp_path: Path) -> None:
    data = attached(PromptFiles(write(tmp_path / "train.txt", "a")))
    with pytest.raises(ConfigError, match=r"nothing to predict: set data\.predict, or data\.val"):
        data.predict_dataloader()


def test_one_process_looks_at_all_rows_and_the_others_wait_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that start at once on a cold cache. A look that fails lets the next one look, and a read-only home lets all look."""
    monkeypatch.setenv("LIT_RL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(verdicts, "WORTH", 1)
    path, looked, second_waits = write(tmp_path / "train.txt", *map(str, range(9))), [], threading.Event()
    look, flock = prompts._look, verdicts.fcntl.flock

    def slow(rows: Any) -> None:
        looked.append(len(rows))
        assert second_waits.wait(120)
        look(rows)

    def watched(file: Any, how: int) -> None:
        if looked:
            second_waits.set()
        flock(file, how)

    monkeypatch.setattr(prompts, "_look", slow)
    monkeypatch.setattr(verdicts.fcntl, "flock", watched)
    first = threading.Thread(target=PromptFiles, args=(path,))
    first.start()
    while first.is_alive() and not looked:
        first.join(0.01)
    assert len(PromptFiles(path).train_prompts) == 9
    first.join()
    assert looked == [9] and not list((tmp_path / "cache").rglob("*.lock"))
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a"}\n{"prompt": ""}\n')
    for place in (tmp_path / "cache", "/proc/none"):
        monkeypatch.setenv("LIT_RL_CACHE", str(place))
        for _ in range(2):
            with pytest.raises(ValueError, match=r"bad\.jsonl:2: key 'prompt'"):
                PromptFiles(str(bad))
    assert looked == [9, 2, 2, 2, 2]
