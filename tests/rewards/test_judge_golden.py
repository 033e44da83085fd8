"""Verdicts, win rates, marks and request bodies against the authors' numbers, deviations given as arguments."""

import json
from pathlib import Path

import pytest

from lit_rl.rewards.judges.dialects import read_points, upstream_points
from lit_rl.rewards.judges.pairs import (
    LABELS,
    Vote,
    blended,
    category_rates,
    ranks,
    read_categories,
    read_pair,
    upstream_pair,
    win_rates,
)

pytestmark = pytest.mark.golden


def loaded(golden_dir: Path, name: str) -> dict:
    return json.loads((golden_dir / f"{name}.json").read_text())


def votes_of(responses: list[dict], labels: tuple[str, str] = LABELS, *, whole: bool = False) -> list[Vote]:
    """The authors' reading of a list of answers; one without a first picture is no comparison there."""
    told = [r for r in responses if r["first_index"] is not None]
    return [Vote(r["first_index"], r["second_index"], upstream_pair(r.get("model_output") or "", labels=labels, whole=whole)) for r in told]


def test_win_rates_of_deepgen(golden_dir: Path) -> None:
    data = loaded(golden_dir, "deepgen/unifiedreward")
    for case in data["pairwise"]:
        votes, count = votes_of(case["inputs"]["responses"]), case["inputs"]["num_items"]
        rates = win_rates(votes, count, unread=0.5, alone=0.0, digits=3)
        assert rates == pytest.approx(case["outputs"]["win_rate"], abs=1e-6), case
        ours = [rate for rate in win_rates(votes, count) if rate == rate]
        assert all(0 <= rate <= 1 for rate in ours) and len(ours) <= count


def test_verdicts_of_deepgen(golden_dir: Path) -> None:
    """Where both readings give a verdict it is the same; ours gives none where two stand in one answer."""
    for case in loaded(golden_dir, "deepgen/unifiedreward")["extract_answer"]:
        inside = case["outputs"] or ""
        theirs = 1.0 if LABELS[0] in inside else 0.0 if LABELS[1] in inside else None
        assert upstream_pair(case["inputs"]) == theirs, case
        if theirs is not None and read_pair(case["inputs"]) is not None:
            assert read_pair(case["inputs"]) == theirs, case


def test_pointwise_marks_of_deepgen(golden_dir: Path) -> None:
    for case in loaded(golden_dir, "deepgen/unifiedreward")["pointwise"]:
        marks = {name: upstream_points(case["inputs"], name=name) for name in ("alignment", "style")}
        combined = [(a + s) / 2 for a, s in zip(*marks.values(), strict=True)]
        for name, found in (marks | {"combined": combined}).items():
            assert found == pytest.approx(case["outputs"][name], abs=1e-6), (case, name)
        for i, answer in enumerate(case["inputs"]):
            if (ours := read_points(answer)) is not None:
                assert (ours["alignment"] + ours["style"]) / 2 == pytest.approx(case["outputs"]["combined"][i], abs=1e-6)


def test_pairwise_rewards_of_pref_grpo(golden_dir: Path) -> None:
    cases = loaded(golden_dir, "pack/pairwise_rewards")["cases"]
    assert {name.partition(".")[0] for name in cases} == {"think", "edit", "flex", "rank"}
    for name, case in cases.items():
        kind = name.partition(".")[0]
        if kind == "rank":
            in_order = ranks(case["scores"], average=False)
            by_score = sorted(zip(case["scores"], case["rewards"]))  # among equal scores torch's order is not specified
            assert sorted(zip(case["scores"], in_order)) == [(s, pytest.approx(r, abs=1e-6)) for s, r in by_score], name
            continue
        if kind == "flex":
            votes = [Vote(r["first_index"], r["second_index"], *read_categories(r["model_output"])) for r in case["responses"]]
        else:
            votes = votes_of(case["responses"], (case["better_1"], case["better_2"]), whole=kind == "edit")
        overall = win_rates(votes, case["num_items"], unread=0.5, alone=0.0, digits=3)
        assert overall == case["dim"]["overall_reward"], name
        if kind != "flex":
            assert overall == pytest.approx(case["rewards"], abs=1e-6), name
            continue
        categories = category_rates(votes, case["num_items"])  # unrounded in the mean, rounded where they are shown
        for category, rates in categories.items():
            assert rates == pytest.approx(case["dim"][category], abs=6e-4), (name, category)
        settings = {
            "overall_weight": case["overall_weight"],
            "category_weight": case["dim_weight"],
            "weights": case["category_weights"],
        }
        theirs = blended(overall, categories, **settings, last_weight=True, digits=3)
        assert theirs == pytest.approx(case["rewards"], abs=1e-6), name
        if case["dim_weight"] == 0:
            assert blended(overall, categories, **settings) == overall  # as the option says
