"""Prompt files that one YAML lists: the authors' parsing and errors, how often each is drawn, and rows that carry their rewards."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import toy_method, toy_trainer

from datamodules.captions import Captions
from datamodules.prompt_sets import PromptSets, SetRows, drawn
from datamodules.prompt_sets_yaml import read_sets
from lit_rl.errors import ConfigError


@pytest.fixture
def files(golden_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(golden_dir / "deepgen" / "dataset", tmp_path / "dataset"))


def golden(golden_dir: Path) -> dict[str, Any]:
    return json.loads((golden_dir / "deepgen" / "dataset_yaml.json").read_text())


@pytest.mark.golden
def test_files_are_read_as_the_authors_read_them(golden_dir: Path, files: Path) -> None:
    """With their leniency as an option; prompts, weights of draws and rewards are the same."""
    data, seen = golden(golden_dir), 0
    for case in data["cases"]:
        if "error" in case["outputs"]:
            continue
        seen += 1
        told, found = case["outputs"], read_sets(files / case["inputs"]["yaml"], known=data["registry"], strict=False)
        assert found.sampling_mode == told["sampling_mode"]
        parsed = [{"name": s.name, "path": s.path.name, "rewards": dict(s.rewards), "sample_weight": s.sample_weight} for s in found.sets]
        assert parsed == told["parsed"] and sorted(found.reward_places) == told["reward_funcs"]
        rows = SetRows(found.sets)
        assert len(rows) == told["length"] == len(list(rows))
        weights = rows.weights(found.sampling_mode)
        if told["sampler_weights"] is None:
            assert (weights == weights[0]).all()
        else:
            assert weights.tolist() == pytest.approx(told["sampler_weights"], rel=1e-15)
        for row, item in zip(rows, told["items"], strict=True):
            assert (row["prompt"], row["reward_weights"], row["data_source"]) == (
                item["prompt"], item["reward_config"], item["dataset_name"],
            )  # fmt: skip
            assert item.get("metadata", {}).items() <= row.items()
    assert seen


@pytest.mark.golden
def test_every_error_of_the_authors_has_its_equal(golden_dir: Path, files: Path) -> None:
    data = golden(golden_dir)
    keys = {
        "Unknown reward": (r"datasets\[0\]\.rewards\[0\]: unknown reward 'not_a_reward'.*there are aesthetic", 5),
        "Invalid sampling_mode": ("sampling_mode: 'other' must be one of sample_proportional, weight_only", 1),
        "sample_weight must": (r"datasets\[0\]\.sample_weight: 0 of x must be a number above 0", 4),
        "Prompts file": (r"datasets\[0\]\.path: .*nope.txt does not exist", 3),
        "Unsupported": (r"datasets\[0\]\.path: uniform.yaml is not read; prompts come from .txt, .jsonl, .parquet", 3),
    }
    failing = [case for case in data["cases"] if "error" in case["outputs"]]
    assert failing
    for case in failing:
        (told,) = [told for start, told in keys.items() if case["outputs"]["message"].startswith(start)]
        file = files / case["inputs"]["yaml"]
        with pytest.raises(ConfigError, match=told[0]) as caught:
            read_sets(file, known=data["registry"])
        assert str(caught.value).startswith(f"{file}:{told[1]}: ")


@pytest.mark.golden
def test_draws_are_the_authors(golden_dir: Path) -> None:
    """Their seed of a rank and an epoch; ours is of the iteration, the same on every process."""
    for case in golden(golden_dir)["distributed_weighted_sampler"]:
        given = case["inputs"]
        draw = torch.Generator().manual_seed(given["epoch"] * given["world_size"] + given["rank"] + 42)
        assert drawn(torch.tensor(given["weights"], dtype=torch.float64), given["num_samples_per_gpu"], draw=draw) == case["outputs"]


def sets(folder: Path, yaml: str, **texts: str) -> Path:
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    (folder / "sets.yaml").write_text(yaml)
    return folder / "sets.yaml"


TWO = "sampling_mode: {}\ndatasets:\n- {{name: few, path: few.txt, sample_weight: {}, rewards: [ocr: 0.5, clip_sim: 0.5]}}\n" + (
    "- {{name: many, path: many.txt, rewards: [clip_sim: 1]}}\n"
)
MANY = "\n".join(str(i) for i in range(10, 40))


@pytest.mark.parametrize(
    ("mode", "weight", "share"), [("sample_proportional", 5.0, 0.25), ("weight_only", 3.0, 0.75), ("weight_only", 1.0, 0.5)]
)
def test_sets_are_drawn_as_often_as_their_mode_says(tmp_path: Path, mode: str, weight: float, share: float) -> None:
    """Two prompts of one file beside thirty of another, in 20 iterations of 200, each with draws of its own."""
    data = PromptSets(str(sets(tmp_path, TWO.format(mode, weight), few="1\n2", many=MANY)), seed=3)
    draws = [[row["prompt"] for row in data.prompts(i, 200)] for i in range(20)]
    sources = Counter(prompt in "12" for prompts in draws for prompt in prompts)
    assert sources[True] / 4000 == pytest.approx(share, abs=0.03)
    assert len({tuple(prompts) for prompts in draws}) == 20
    again = PromptSets(str(tmp_path / "sets.yaml"), seed=3)
    assert [row["prompt"] for row in again.prompts(7, 200)] == draws[7]


def test_sets_of_equal_weight_come_in_permutations(tmp_path: Path) -> None:
    data = PromptSets(str(sets(tmp_path, TWO.format("sample_proportional", 1.0), few="1\n2", many=MANY)))
    assert sorted(row["prompt"] for row in data.prompts(0, 32)) == sorted(["1", "2", *MANY.split()])


def test_tables_and_lines_may_call_a_prompt_a_caption(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"caption": ["a", "b"], "tag": [1, 2]}), tmp_path / "t.parquet")
    rows = Captions(tmp_path / "t.parquet")
    assert [(row["prompt"], row["tag"]) for row in rows] == [("a", 1), ("b", 2)] and rows.where(1).endswith("t.parquet: row 2")
    (tmp_path / "l.jsonl").write_text('{"prompt": "p", "caption": "c"}\n\n{"caption": "d"}\n')
    assert [row["prompt"] for row in Captions(tmp_path / "l.jsonl")] == ["p", "d"]
    for text, message in (('{"caption": " "}', r"l.jsonl:1: one of the keys prompt and caption"), ("[1]", "l.jsonl:1: expected an object"),
                          ("{", "l.jsonl:1: not JSON")):  # fmt: skip
        (tmp_path / "l.jsonl").write_text(text)
        with pytest.raises(ConfigError, match=message):
            Captions(tmp_path / "l.jsonl")


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("datasets: []", r"sets.yaml:1: datasets: is empty"),
        ("set: []", r"sets.yaml:1: datasets: must be a list"),
        ("datasets:\n- x", r"sets.yaml:2: datasets\[0\]: must have the keys"),
        ("datasets:\n- {path: few.txt, weight: 2}", r"sets.yaml:2: unknown key 'weight' \(did you mean sample_weight\?\)"),
        (
            "datasets:\n- path: few.txt\n  rewards:\n  - ocr",
            r"sets.yaml:4: datasets\[0\].rewards\[0\]: 'ocr' has no weight; write `ocr: 1.0`",
        ),
        ("datasets:\n- path: few.txt\n  rewards: []", r"sets.yaml:3: datasets\[0\].rewards: must be a list such as"),
        ("datasets:\n- path: few.txt\n  rewards: [{ocr: .nan}]", r"rewards\[0\].ocr: the weight nan must be a finite number"),
        ("datasets:\n- path: few.txt\n  sample_weight: yes\n  rewards: [ocr: 1]", r"sets.yaml:3: datasets\[0\].sample_weight: True"),
        ("datasets:\n- rewards: [ocr: 1]", r"datasets\[0\].path: names no file"),
        ("datasets: [", r"sets.yaml:1: this is not YAML"),
    ],
)
def test_errors_name_file_line_and_key(tmp_path: Path, yaml: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PromptSets(str(sets(tmp_path, yaml, few="1")))


def test_without_a_file_its_variable_is_named_and_rows_say_where_they_stand(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.train: no file of prompt sets; name the YAML there, or in \$DATASET_CONFIG"):
        PromptSets()
    data = PromptSets(str(sets(tmp_path, TWO.format("weight_only", 1), few="1", many="2")), val=str(tmp_path / "many.txt"))
    assert [row["prompt"] for row in data.held_out] == ["2"]
    assert {row["prompt"]: row["where"] for row in data.rows_to_score("validate")} == {"2": f"{tmp_path}/many.txt:1"}
    places = [(row["prompt"], row["where"]) for row in data.rows_to_score("fit")]
    assert places[:2] == [("1", f"{tmp_path}/few.txt:1"), ("2", f"{tmp_path}/many.txt:1")]


def test_a_reward_that_the_run_does_not_give_is_told_before_it_starts(tmp_path: Path) -> None:
    yaml = "datasets:\n- {path: few.txt, rewards: [brightness: 1.0]}\n- {path: few.txt, rewards: [britness: 1.0]}"
    data = PromptSets(str(sets(tmp_path, yaml, few="1\n2")))
    with pytest.raises(ConfigError, match=r"sets.yaml:3: datasets\[1\].rewards\[0\] names the reward 'britness'.*did you mean brig"):
        toy_trainer(tmp_path).fit(toy_method(), data)
