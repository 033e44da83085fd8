"""Evaluation sets on several processes: each renders and asks about its share, however unequal, and all log what one process logs."""

from __future__ import annotations

import json
from pathlib import Path

import evaluated_runs
import numpy as np
import pytest
from fake_judge import Asked, FakeJudge
from pair import Pair
from PIL import Image

from lit_rl.evaluation.judging import MODEL


def by_prompt(asked: Asked) -> str:
    """A verdict that depends on the prompt alone."""
    return f"<analysis>['x']</analysis><score>[{int(any(f'「{i}」' in asked.text for i in (0, 3)))}]</score>"


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero2"])
def test_two_processes_evaluate_as_one_does(pair: Pair, tmp_path: Path, strategy: str) -> None:
    """Five images: batches of two for each process, of which the last one of the second process is filled up; and two sets."""
    rows = [{"prompt": str(i), "sub_dims": {"Testpoints": ["Style"]}} for i in range(5)]
    (tmp_path / "five.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "one.txt").write_text("9\n")
    yaml = tmp_path / "eval.yaml"
    yaml.write_text("datasets:\n- {name: five, path: five.jsonl, scoring: unigenbench}\n- {name: one, path: one.txt}\n")
    with FakeJudge(by_prompt, model=MODEL) as judge:
        one = evaluated_runs.fit(str(tmp_path / "one"), str(yaml), judge.url)
        asked = len(judge.asked)
        many = pair.run("evaluated_runs.fit", folder=str(tmp_path / "two"), yaml=str(yaml), url=judge.url, strategy=strategy)
    assert asked == 5 and len(judge.asked) == 10
    for found in many:
        assert found == pytest.approx(one) and found["eval/five/overall_accuracy"] == pytest.approx(2 / 5)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.png"))
    assert len(files) == 6
    for file in files:
        first, second = (np.asarray(Image.open(tmp_path / run / file), dtype=int) for run in ("one", "two"))
        assert abs(first - second).max() <= 1
