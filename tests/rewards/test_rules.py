"""Rules against the authors' verdicts, and how rows find theirs."""

from __future__ import annotations

import json
import logging
import math as numbers
from collections.abc import Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lit_rl.errors import ConfigError
from lit_rl.rewards.base import RewardError, TextReward
from lit_rl.rewards.text.gsm8k import gsm8k, gsm8k_robust
from lit_rl.rewards.text.math import equal, math
from lit_rl.rewards.text.math_dapo import math_dapo, math_dapo_boxed
from lit_rl.rewards.text.rules import SOURCES, RuleReward
from lit_rl.rewards.text.style import THINKING, FormatReward, RepetitionReward, matches, repetition_penalty
from lit_rl.types import Info


def verdict(case: Mapping[str, Any]) -> dict[str, Any]:
    """Our answer to a case, under the names of the authors' answer."""
    scorer, _, parameters = case["scorer"].partition("(")
    if scorer == "gsm8k":
        asked = (case["response"], case["ground_truth"])
        plain, lenient = (gsm8k(*asked, method=case["method"], format_score=score) for score in (0.0, 0.1))
        return {"extracted": plain.read, "score": plain.score, "score_with_format_0p1": lenient.score}
    if scorer == "math_reward":
        return {"score": math(case["response"], case["ground_truth"]).score}
    if scorer == "math_dapo":
        boxed = case["strict_box_verify"]
        score, right, read = (math_dapo_boxed if boxed else math_dapo)(case["response"], case["ground_truth"])
        return {"score": score, "acc": right, "pred": read if read is not None or boxed else "[INVALID]"}
    if scorer == "trl.think_format_reward":
        return {"score": float(matches(case["response"], THINKING))}
    if scorer == "trl.repetition_penalty":
        n, penalty = parameters.removesuffix(")").split(",")
        return {"score": pytest.approx(repetition_penalty(case["completion_ids"], n=int(n), penalty=float(penalty)), abs=1e-12)}
    raise NotImplementedError(f"scorer {scorer}")


@pytest.mark.golden
def test_every_verdict_is_the_authors(golden_dir: Path) -> None:
    cases = json.loads((golden_dir / "llm" / "rule_rewards.json").read_text())
    assert {case["scorer"].partition("(")[0] for case in cases} >= {"gsm8k", "math_reward", "math_dapo"}
    for case in cases:
        ours = verdict(case)
        assert ours == {name: case[name] for name in ours}, case


@pytest.mark.parametrize(
    ("answer", "truth", "right"),
    [
        ("####18", "18", True),
        ("#### $18.00", "18", True),
        ("#### -$3,371.", "-3371", True),
        ("#### 1,234.", "1234", True),
        ("####  0.50 apples", "0.5", True),
        ("#### 17\n#### 18.", "18", True),
        ("#### 18.5", "18", False),
        ("The answer is 18", "18", None),
        ("#### .", "0", None),
        ("#### 1.2.3", "1.2.3", True),
    ],
)
def test_robust_compares_numbers(answer: str, truth: str, right: bool | None) -> None:
    """None: there is no answer."""
    found = gsm8k_robust(answer, truth, format_score=0.1)
    assert (found.right, found.read is not None) == (bool(right), right is not None)
    assert found.score == (0.0 if right is None else 1.0 if right else 0.1)


@given(st.integers(-(10**9), 10**9))
def test_what_strict_accepts_robust_accepts(value: int) -> None:
    for text in (f"so #### {value}", f"so #### {value:,}"):
        assert gsm8k(text, str(value)).right and gsm8k_robust(text, str(value)).right


@pytest.mark.parametrize("broken", ["\\frac", "\\sqrt", "a\\text{ b}\\text{ c}"])
def test_latex_that_is_not_understood_is_compared_as_it_is(broken: str) -> None:
    assert equal(broken, broken) and not equal(broken, broken + " ")


def test_style() -> None:
    """<think> ... </think> once; 2-grams of a b a b are ab ba ab: one of three comes again."""
    prompts = [{"prompt": "p"}] * 2
    assert FormatReward().score(["<think>a\n</think>b", "<think>a"], prompts)["format"].tolist() == [1, 0]
    assert FormatReward(r".*\d$").score(["is\n4", "four"], prompts)["format"].tolist() == [1, 0]
    words = RepetitionReward(n=2, penalty=-3.0).score(["A b a B", "a"], prompts)["repetition"]
    torch.testing.assert_close(words, torch.tensor([-1.0, 0.0]))
    letters = RepetitionReward(n=1, of="characters").score(["aab", ""], prompts)["repetition"]
    torch.testing.assert_close(letters, torch.tensor([-1 / 3, 0.0]))
    with pytest.raises(ConfigError, match="no regular expression"):
        FormatReward("(")


# ---------------------------------------------------------------------- which rule


def row(source: str | None = None, truth: Any = "18", style: str | None = "rule") -> dict[str, Any]:
    known = {} if source is None else {"data_source": source}
    asked = {"style": style, "ground_truth": truth}
    return {"prompt": "p", "id": "x-7", "reward_model": {k: v for k, v in asked.items() if v is not None}} | known


class Lengths(TextReward):
    """A model: the number of characters."""

    outputs = ("reward_model",)
    place: str | None = None

    def setup(self, *, rank: int, world_size: int, device: str) -> None:
        self.place = device

    def score(self, media: Sequence[str], info: Sequence[Info]) -> Mapping[str, Tensor]:  # type: ignore[override]
        return {"reward_model": torch.tensor([float(len(text)) for text in media])}


def test_rows_find_their_rule_by_source_then_by_style() -> None:
    reward = RuleReward(default="math", model=Lengths(), sources={"mine": "gsm8k_flexible", "openai/gsm8k": "gsm8k_robust"})
    assert [reward.route(row(source)) for source in SOURCES if "*" not in source and source != "openai/gsm8k"] == [
        rule for source, rule in SOURCES.items() if "*" not in source and source != "openai/gsm8k"
    ]
    assert reward.route(row("openai/gsm8k")) == "gsm8k_robust", "the run's own names come first"
    assert reward.route(row("aime_2024")) == "math_dapo"
    assert reward.route(row("mine", style="model")) == "gsm8k_flexible", "the source comes before the style"
    assert reward.route(row(None)) == reward.route(row("other", 18)) == "math"
    assert reward.route(row("other", None, "model")) == "model"


def test_scores_of_rules_and_of_the_model_side_by_side() -> None:
    reward = RuleReward(model=Lengths(), format_score=0.25)
    reward.setup(rank=0, world_size=1, device="cpu")
    assert isinstance(reward.model, Lengths) and reward.model.place == "cpu"
    info = [row("gsm8k"), row("gsm8k"), row("x", None, "model"), row("gsm8k"), row("math_dapo", 18)]
    scores = reward.score(["#### 18", "#### 19", "four", "18", "Answer: 17"], info)
    assert list(scores) == ["score", "acc", "parsed"] == list(reward.outputs)
    assert scores["score"].tolist() == [1, 0.25, 4, 0, -1]
    nothing = numbers.nan
    torch.testing.assert_close(scores["acc"], torch.tensor([1, 0, nothing, 0, 0]).double(), equal_nan=True)
    torch.testing.assert_close(scores["parsed"], torch.tensor([1, 1, nothing, 0, 1]).double(), equal_nan=True)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            row("other"),
            r"row x-7: data_source 'other' has no rule and reward_model.style is 'rule': known sources are gsm8k, openai/gsm8k, ",
        ),
        (row("other", None, "model"), "Give RuleReward a model"),
        ({"prompt": "p"}, "data_source 'None' has no rule and reward_model.style is None"),
        (row("gsm8k", None), "reward_model.ground_truth: rule gsm8k needs a text or number, found None"),
        (row("gsm8k", {"value": "18"}), r"needs a text or number, found \{'value': '18'\}; a list may hold several accepted answers"),
        (row("math", numbers.nan), "rule math needs a text or number, found nan"),
        (row("math", "nan"), "found 'nan'"),
        (row("math", numbers.inf), "found inf"),
        (row("math", " "), "found ' '"),
        (row("math", []), r"found \[\]"),
        (row("math", ["4", None]), r"found \['4', None\]"),
        (row("gsm8k", "Paris"), "rule gsm8k reads numbers, found 'Paris'; name a rule that reads texts"),
        (row("gsm8k", "72,5"), "rule gsm8k counts no answer as right where the truth is '72,5', not even '#### 72,5'"),
        (row("math", "{1,2"), "counts no answer as right"),
        (row("math_dapo", "one\ntwo"), "counts no answer as right"),
        (row("math_dapo", "x" * 400), "counts no answer as right"),
        (row("maths"), "Did you mean math?"),
    ],
)
def test_rows_that_nobody_can_score_are_found_before_training(bad: dict, message: str, caplog: pytest.LogCaptureFixture) -> None:
    reward = RuleReward()
    with pytest.raises(ConfigError, match=f"^14 prompts whose answers nobody can score\n(?s:.*){message}(?s:.*)and 4 more$"):
        reward.check([row("gsm8k")] + [bad] * 14)
    with pytest.raises(RewardError, match=message.removeprefix("row x-7: ")):
        reward.score(["#### 18"], [bad])
    with caplog.at_level(logging.INFO):
        reward.check([row("gsm8k"), row("gsm8k"), row("math")])
    assert "2 rows by gsm8k, 1 rows by math" in caplog.text


SAYS = {
    "gsm8k": "so #### {}",
    "gsm8k_flexible": "it is {} .",
    "gsm8k_robust": "#### {}",
    "math": "\\boxed{{{}}}",
    "math_dapo": "Answer: {}",
}
ALIKE = [
    *[("72", truth) for truth in (72.0, 72, "72.0", " 72 ", "72.", "+72", "7.2e1", "$72$", "\\boxed{72}", "$\\boxed{72}$", "\\(72\\)")],
    *[
        ("72", truth)
        for truth in ("48 + 24 = 72\n#### 72", Decimal("72.00"), np.float32(72), np.int64(72), np.array(72.0), torch.tensor(72.0))
    ],
    *[("72", truth) for truth in (["71", "72"], ("72.0",), np.array(["72"]), {72.0}, '["72"]', pa.scalar(72.0), pa.scalar("72"), b"72")],
    *[("1234", truth) for truth in ("1,234", 1234.0, "$1,234", "\\$1,234", "1{,}234", "1,234.00", 1234)],
    *[("50", truth) for truth in ("50%", "50\\%", "$50\\%$", 50.0)],
    *[("18.50", truth) for truth in (18.5, "18.50", Decimal("18.5"), "$18.50")],
    *[("0.1", truth) for truth in (0.1, np.float32(0.1), float(np.float32(0.1)), ".1", "0.10")],
    *[("-7", truth) for truth in (-7.0, "-7", "-7.0", -7)],
    *[("33", truth) for truth in ("033", 33)],
    ("100000000000000000000000", 1e23),
    ("0.00001", 1e-05),
    ("0", -0.0),
]


@pytest.mark.parametrize("rule", SAYS)
@pytest.mark.parametrize(("said", "truth"), ALIKE, ids=repr)
def test_a_right_answer_is_right_however_the_file_holds_the_truth(rule: str, said: str, truth: Any) -> None:
    reward = RuleReward(sources={"mine": rule})
    scores = reward.score([SAYS[rule].format(said), SAYS[rule].format("6")], [row("mine", truth)] * 2)
    assert scores["score"].tolist() == [1.0, -1.0 if "dapo" in rule else 0.0] and scores["acc"].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("said", "truth", "right"),
    [
        ("True", True, True),
        ("False", np.bool_(False), True),
        ("False", True, False),
        ("\\frac{1}{2}", Fraction(1, 2), True),
        ("1/2", "\\frac12", True),
        ("1/2", 0.5, True),
        ("B", ["A", "B"], True),
        ("12", "1,2", False),
        ("3", "$3$ or $4$", False),
        ("72.01", 72.0, False),
    ],
)
def test_texts_and_formulas_as_truth(said: str, truth: Any, right: bool) -> None:
    assert RuleReward().score([f"\\boxed{{{said}}}"], [row("math", truth)])["acc"].tolist() == [right]


NAMES = ["my[v2]", "a*b", "what?", "[!x]", "x[", "]", "plain", "set[12]*"]


@pytest.mark.parametrize("name", NAMES)
def test_a_source_is_itself_whatever_its_letters(name: str) -> None:
    reward = RuleReward(sources={"*": "math_dapo", **dict.fromkeys(NAMES, "gsm8k_flexible"), name: "gsm8k_robust"})
    assert reward.route(row(name)) == "gsm8k_robust"
    assert RuleReward(sources={name: "math"}).route(row(name)) == "math"


def test_which_of_several_patterns() -> None:
    """The equal name, then the first pattern in the order of the file; the run's own patterns before the known names."""
    reward = RuleReward(sources={"my[v2]*": "math", "my*": "gsm8k", "*": "gsm8k_robust", "my_own": "math_dapo", "s[12]": "math_dapo"})
    asked = {"my[v2]-train": "math", "my2": "math", "myth": "gsm8k", "my_own": "math_dapo", "aime24": "gsm8k_robust"}
    assert {source: reward.route(row(source)) for source in asked} == asked
    assert RuleReward(sources={"s[12]": "math_dapo"}).route(row("s1")) == "math_dapo"


def test_sources_that_no_row_has_are_told(caplog: pytest.LogCaptureFixture) -> None:
    RuleReward(sources={"my_sett": "math", "x[1]": "math", "g*": "gsm8k"}).check([row("gsm8k"), row("x[1]")])
    assert "no row has the data_source my_sett that sources names" in caplog.text


def test_rules_that_do_not_exist() -> None:
    with pytest.raises(ConfigError, match="mine: there is no rule 'gsm'; choose from gsm8k, "):
        RuleReward(sources={"mine": "gsm"})
    with pytest.raises(ConfigError, match="default: there is no rule"):
        RuleReward(default="x")
