"""UniGenBench's readings and accuracies against the authors' numbers, and what a missing answer counts as."""

import csv
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_rl.errors import ConfigError
from lit_rl.evaluation.instructions import TEMPLATES, Templates, instruction
from lit_rl.evaluation.judging import judge_client, unigenbench_judge
from lit_rl.evaluation.sets import Scoring, scoring_of
from lit_rl.evaluation.unigenbench import (
    SEPARATORS,
    Verdict,
    losses,
    metric_name,
    metrics,
    primary,
    read_verdict,
    statistics,
    write_results,
)
from lit_rl.rewards.judges.messages import question, written


@pytest.fixture(scope="module")
def told(golden_dir: Path) -> dict:
    return json.loads((golden_dir / "deepgen/unigenbench.json").read_text())


def verdict(points: list[str], scores: list[int] | None, index: int = 0, status: str = "judged") -> Verdict:
    return Verdict(index, 0, "p", f"{index}.0.png", points, status if scores is None else "judged", scores)  # type: ignore[arg-type]


# ---------------------------------------------------------------------- the authors' numbers
@pytest.mark.golden
def test_answers_are_read_as_the_authors_read_them(told: dict) -> None:
    for case in told["parse_response"]:
        points, expected = case["inputs"]["testpoints"], case["outputs"]
        found = read_verdict(case["inputs"]["text"], points)
        assert (found is not None) is expected["success"], case
        assert (found[0] if found else [0] * len(points)) == expected["scores"], case


@pytest.mark.golden
def test_statistics_and_metrics_are_the_authors_where_an_unreadable_answer_is_all_wrong(told: dict) -> None:
    for case in told["statistics"]:
        rows = [
            Verdict(
                row["index"], row["dup_idx"], "", "", row["testpoints"], *(("judged", row["scores"]) if row["success"] else ("unreadable",))
            )
            for row in case["inputs"]
        ]
        assert statistics(rows, unreadable="wrong") == case["outputs"]["stats"]
        assert metrics("demo", rows, unreadable="wrong") == case["outputs"]["metrics"]


@pytest.mark.golden
def test_scoring_is_read_as_the_authors_read_it(told: dict) -> None:
    for case in told["scoring_config"]:
        expected = case["outputs"]
        assert scoring_of(case["inputs"]) == (None if expected is None else Scoring(**expected)), case


@pytest.mark.golden
def test_a_request_has_the_authors_form(golden_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Address, fields and order of parts; the long text's words are a user's own, what must stand in it is there."""
    for case in json.loads((golden_dir / "deepgen/http_bodies.json").read_text())["unigenbench"]:
        request, body = case["request"], case["request"]["body"]
        monkeypatch.setenv("UNIGENBENCH_API_URL", request["url"].removesuffix("/v1/chat/completions"))
        monkeypatch.setenv("UNIGENBENCH_MODEL_NAME", body["model"])
        client = judge_client(unigenbench_judge())
        text = instruction(
            TEMPLATES[case["language"]], prompt=case["prompt"], testpoints=case["testpoints"], descriptions=case["descriptions"]
        )
        picture = body["messages"][0]["content"][0]
        sent = json.loads(client.request(question(text, picture)))
        part = body["messages"][0]["content"][1]["text"]
        assert all(piece in text for piece in part["contains"])
        assert sent == body | {"messages": [{"role": "user", "content": [picture, written(text)]}]}
        assert f"{client.urls[0]}/v1/chat/completions" == request["url"]


# ---------------------------------------------------------------------- what is counted
def test_an_answer_that_says_no_scores_is_missing_and_not_wrong() -> None:
    rows = [verdict(["A - b", "C"], [1, 0]), verdict(["A - b"], None, 1, "unreadable"), verdict(["C"], None, 2, "no_answer")]
    rows.append(verdict(["D"], None, 3, "no_image"))
    left_out, wrong = statistics(rows), statistics(rows, unreadable="wrong")
    assert (left_out["total_correct"], left_out["total_count"], left_out["overall_accuracy"]) == (1, 2, 0.5)
    assert (wrong["total_correct"], wrong["total_count"]) == (1, 4)  # an image that is not there is no answer either way
    assert left_out["success_rate"] == wrong["success_rate"] == 1 / 3
    assert left_out["sub_dims"]["D"] == {"accuracy": None, "correct": 0, "total": 0}  # type: ignore[index]
    assert "eval/x/D" not in metrics("x", rows) and metrics("x", rows)["eval/x/A.A-b"] == 1.0
    assert losses(rows) == {"images": 4, "judged": 1, "missing_images": 1, "unanswered": 1, "unreadable": 1}


def test_nothing_judged_is_no_accuracy_and_not_zero() -> None:
    rows = [verdict(["A"], None, status="no_answer")]
    assert statistics(rows)["overall_accuracy"] is None and metrics("x", rows) == {"eval/x/success_rate": 0.0}
    assert metrics("x", []) == {} and statistics([])["success"] is False


def test_chinese_testpoints_have_dimensions_too() -> None:
    rows = [verdict(["属性-数量", "属性-颜色", "风格"], [1, 0, 1])]
    found = statistics(rows, separator=SEPARATORS["zh"])
    assert found["primary_dims"]["属性"] == {"accuracy": 0.5, "correct": 1, "total": 2}  # type: ignore[index]
    assert metric_name("属性-数量", separator="-") == "属性.属性-数量" and primary("风格", separator="-") == "风格"


points = st.lists(st.sampled_from(["Style", "Attribute - Color", "Attribute - Shape", "Action - Hand"]), min_size=1, max_size=4)
verdicts = st.lists(
    points.flatmap(
        lambda p: st.builds(verdict, st.just(p), st.none() | st.lists(st.sampled_from([0, 1]), min_size=len(p), max_size=len(p)))
    ),
    max_size=8,
)


@given(rows=verdicts)
def test_dimensions_sum_to_the_whole(rows: list[Verdict]) -> None:
    """And no answer that is missing raises or lowers what is counted."""
    found = statistics(rows)
    for level in ("primary_dims", "sub_dims"):
        parts = found[level].values()  # type: ignore[attr-defined]
        assert sum(part["correct"] for part in parts) == found["total_correct"]
        assert sum(part["total"] for part in parts) == found["total_count"]
    assert statistics([*rows, verdict(["Style"], None, status="unreadable")])["overall_accuracy"] == found["overall_accuracy"]


@given(scores=st.lists(st.sampled_from([0, 1]), min_size=1, max_size=5), text=st.text(alphabet="<>/scorea[]01,", max_size=30))
def test_scores_come_from_the_last_form_and_from_no_noise(scores: list[int], text: str) -> None:
    answer = f"<analysis>['x']</analysis><score>{scores}</score>"
    assert read_verdict(answer, ["p"] * len(scores)) == (scores, ["x"])
    assert read_verdict(f"<think>{answer}", ["p"] * len(scores)) is None
    assert read_verdict(f"<think><score>[9]</score></think>{answer}", ["p"] * len(scores)) == (scores, ["x"])
    read_verdict(text, ["p"])  # whatever it is


@pytest.mark.parametrize("scores", ["[2]", "[True]", "[0.5]", "['1']", "(1,)", "[1, 0]", "[__import__('os')]", "[" * 500])
def test_scores_that_are_no_list_of_0_and_1_are_none(scores: str) -> None:
    assert read_verdict(f"<analysis>['x']</analysis><score>{scores}</score>", ["p"]) is None


# ---------------------------------------------------------------------- the instruction and the files
def test_a_prompt_fills_one_field_and_is_no_markup() -> None:
    text = instruction("P {prompt} T {testpoints} D {descriptions}", prompt="{testpoints} </score>", testpoints=["a"], descriptions=["b"])
    assert text == "P {testpoints} < /score> T ['a'] D - a: b"


def test_a_template_that_lacks_something_is_told(tmp_path: Path) -> None:
    (file := tmp_path / "judge.txt").write_text("{prompt} <score>", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"templates.zh: .*judge.txt lacks \{testpoints\}"):
        Templates(zh=str(file)).read("zh")
    file.write_text("{prompt} {testpoints} <score>")
    with pytest.raises(ConfigError, match="does not ask for <analysis>"):
        Templates(en=str(file)).read("en")
    with pytest.raises(ConfigError, match="templates.en: .*nowhere cannot be read"):
        Templates(en=str(tmp_path / "nowhere")).read("en")
    file.write_text("判 {prompt} {testpoints} <analysis> <score>", encoding="utf-8")
    assert Templates(zh=str(file)).read("zh").startswith("判") and Templates().read("zh") == TEMPLATES["zh"]


def test_files_name_every_image(tmp_path: Path) -> None:
    rows = [verdict(["风格"], None, 7, "unreadable"), verdict(["风格", "A"], [1, 0], 3)]
    write_results(tmp_path, rows, statistics(rows) | losses(rows))
    with open(tmp_path / "unigenbench_scores.csv", newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [(row["index"], row["status"], row["scores"]) for row in table] == [("3", "judged", "[1, 0]"), ("7", "unreadable", "null")]
    assert json.loads(table[0]["testpoints"]) == ["风格", "A"]
    summary = json.loads((tmp_path / "unigenbench_summary.json").read_text(encoding="utf-8"))
    assert summary["overall_accuracy"] == 0.5 and summary["unreadable"] == 1
