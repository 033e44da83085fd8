"""Functions of one's own and reward models, and who looks at the rows before a run."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from text_rows import jsonl

from callbacks.reward_scoring import RewardScoring
from datamodules.mixed import PromptsAndPairs
from datamodules.prompts_text import TextPrompts
from lit_rl.errors import ConfigError
from lit_rl.miniatures.lm import END, build_lm
from lit_rl.rewards.base import RewardError
from lit_rl.rewards.text.function import FunctionReward
from lit_rl.rewards.text.model import ModelReward
from lit_rl.rewards.text.rules import RuleReward

SOURCE = """
import asyncio, time

def compute_score(data_source, solution_str, ground_truth, extra_info, bonus=0.0):
    extra_info["seen"] = True
    if solution_str == "raise":
        raise KeyError("no such word")
    if solution_str == "hang":
        time.sleep(600)
    if solution_str == "text":
        return "good"
    if solution_str == "nan":
        return float("nan")
    return {"score": (solution_str == ground_truth) + bonus, "length": len(solution_str), "pred": solution_str, "source": data_source}

begun = []

async def asynchronous(data_source, solution_str, ground_truth, extra_info):
    begun.append(solution_str)
    while len(begun) < 8 or solution_str == "hang":
        await asyncio.sleep(0.01)
    return solution_str == ground_truth
"""


def rows(count: int) -> list[dict]:
    return [{"prompt": "p", "data_source": "s", "reward_model": {"ground_truth": "18"}, "extra_info": {"index": i}} for i in range(count)]


@pytest.fixture
def source(tmp_path: Path) -> str:
    (tmp_path / "scores.py").write_text(SOURCE)
    return str(tmp_path / "scores.py")


def test_a_function_scores_rows_and_leaves_them_alone(source: str) -> None:
    reward = FunctionReward(source, extras=["length"], arguments={"bonus": 0.5})
    reward.setup(rank=0, world_size=1, device="cpu")
    info = rows(2)
    scores = reward.score(["18", "a"], info)
    assert {name: values.tolist() for name, values in scores.items()} == {"function": [1.5, 0.5], "length": [2, 1]}
    assert info == rows(2), "a function that writes to extra_info writes to a copy"


def test_what_fails_is_nan_and_counted_and_spoils_nothing_else(source: str) -> None:
    reward = FunctionReward(source, timeout_s=1.5)
    started = time.perf_counter()
    (values,) = reward.score(["18", "raise", "hang", "text", "nan", "no"], rows(6)).values()
    assert time.perf_counter() - started < 300
    torch.testing.assert_close(values, torch.tensor([1, *[math.nan] * 4, 0]).double(), equal_nan=True)
    assert reward.counters() == {"timeouts": 1, "errors": 3}
    reward.score(["raise"], rows(1))
    assert reward.last_error == f"{source}:4: compute_score: raised KeyError: 'no such word', at line 7, for row 'p'"
    missing = FunctionReward(source, extras=["speed"])
    assert missing.score(["18"], rows(1))["function"].isnan().all() and "without 'speed'" in missing.last_error


def test_asynchronous_functions_wait_together(source: str) -> None:
    """None of the eight ends before all have begun, and one is given up."""
    reward = FunctionReward(source, "asynchronous", name="mine", timeout_s=2.0, concurrency=8)
    (values,) = reward.score(["18"] * 6 + ["17", "hang"], rows(8)).values()
    torch.testing.assert_close(values, torch.tensor([1] * 6 + [0, math.nan]).double(), equal_nan=True)
    assert reward.counters() == {"timeouts": 1, "errors": 0}


def function(folder: Path, source: str, *, name: str = "reward.py", **options: Any) -> FunctionReward:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(source)
    return FunctionReward(str(folder / name), **options)


def verdict(reward: FunctionReward, answer: str = "18") -> float:
    reward.setup(rank=0, world_size=1, device="cpu")
    return float(reward.score([answer], [{"prompt": "p", "id": "row-7", "reward_model": {"ground_truth": "18"}}])[reward.name])


HEAD = "def compute_score(data_source, solution_str, ground_truth, extra_info=None"


@pytest.mark.parametrize(
    "source",
    [
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass V:\n    score: float\n"
        f"{HEAD}):\n    return V(float(ground_truth in solution_str))",
        f"from dataclasses import dataclass\n@dataclass(slots=True)\nclass V:\n    score: float\n{HEAD}):\n    return V(1.0)",
        f"from typing import NamedTuple\nclass V(NamedTuple):\n    right: bool\n    score: float\n{HEAD}):\n    return V(False, 1.0)",
        f"from enum import Enum\nclass V(float, Enum):\n    RIGHT = 1.0\n{HEAD}):\n    return V.RIGHT",
        f"import enum\nclass V(enum.Enum):\n    RIGHT = 1\n{HEAD}):\n    return {{'score': V.RIGHT}}",
        "from __future__ import annotations\nimport typing\nclass A: ...\n"
        f"def f(x: A) -> A: ...\nassert typing.get_type_hints(f)['x'] is A\n{HEAD}):\n    return True",
        f"import pickle\nclass A: ...\n{HEAD}):\n    return type(pickle.loads(pickle.dumps(A()))) is A",
        f"import sys\nif __name__ == '__main__':\n    sys.exit('run as a script')\n{HEAD}):\n    return 1",
        f"import numpy as np\n{HEAD}):\n    return np.array([1.0])",
        f"import torch\n{HEAD}):\n    return torch.tensor(1)",
        f"from fractions import Fraction\n{HEAD}):\n    return Fraction(1), 'why'",
        f"import asyncio\nasync def later():\n    await asyncio.sleep(0)\n    return 1\n{HEAD}):\n    return later()",
        "class Judge:\n    async def __call__(self, solution_str, **row):\n        return 1\ncompute_score = Judge()",
        f"from functools import partial\n{HEAD}, *, right):\n    return right\ncompute_score = partial(compute_score, right=1)",
        "def compute_score(**row):\n    return row['ground_truth'] == row['solution_str']",
    ],
)
@pytest.mark.parametrize("name", ["reward.py", "my reward-v1.2.py"])
def test_files_that_python_can_import_score(tmp_path: Path, source: str, name: str) -> None:
    assert verdict(function(tmp_path, source, name=name)) == 1


def test_what_lies_beside_a_file_can_be_imported(tmp_path: Path) -> None:
    for folder, score in (("a", 1.0), ("b", 0.5)):
        (tmp_path / folder / "pkg/inner").mkdir(parents=True)
        for file in ("pkg/__init__.py", "pkg/inner/__init__.py"):
            (tmp_path / folder / file).write_text("from .rules_of_mine import right\n" if "inner" not in file else "")
        for file in (f"beside_{folder}.py", "rules_of_mine.py", "pkg/rules_of_mine.py"):
            (tmp_path / folder / file).write_text(f"def right(): return {score}\n")
        for imports, at in [
            (f"from beside_{folder} import right", "one.py"),
            ("from .rules_of_mine import right", "two.py"),
            ("from ..rules_of_mine import right", "pkg/inner/three.py"),
            ("from .. import right", "pkg/inner/four.py"),
        ]:
            file = tmp_path / folder / at
            assert verdict(function(file.parent, f"{imports}\n{HEAD}):\n    return right()", name=file.name)) == score, (folder, at)
        (tmp_path / folder / "pkg/__init__.py").write_text(f"from .rules_of_mine import right\n{HEAD}):\n    return right()")
        assert verdict(FunctionReward(str(tmp_path / folder / "pkg"))) == score


def test_a_sibling_is_not_taken_for_another_of_its_name(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same_name.py").write_text(f"right = {float(folder == 'a')}\n")
    source = f"from same_name import right\n{HEAD}):\n    return right"
    assert verdict(function(tmp_path / "a", source)) == 1
    with pytest.raises(
        ConfigError, match=r"b/reward.py imports same_name, .*b/same_name.py, but .*a/same_name.py was loaded .*from .same_name"
    ):
        verdict(function(tmp_path / "b", source))
    assert verdict(function(tmp_path / "b", source.replace("from s", "from .s"), name="other.py")) == 0


def test_a_file_that_changes_is_run_again_and_one_that_does_not_is_not(tmp_path: Path) -> None:
    source = f"count = []\n{HEAD}):\n    count.append(1)\n    return len(count)"
    assert [verdict(function(tmp_path, source)), verdict(FunctionReward(str(tmp_path / "reward.py")))] == [1, 2]
    (tmp_path / "reward.py").write_text(source.replace("len(count)", "-len(count)"))
    assert verdict(FunctionReward(str(tmp_path / "reward.py"))) == -1
    assert not list(tmp_path.rglob("__pycache__"))


def test_processes_of_a_function_find_what_it_sends_them(tmp_path: Path) -> None:
    (tmp_path / "rules_for_pool.py").write_text("def judge(a, b): return float(a in b)\n")
    source = f"""
import multiprocessing as mp
from concurrent.futures import ProcessPoolExecutor
from rules_for_pool import judge
def mine(a, b): return judge(a, b)
{HEAD}):
    with ProcessPoolExecutor(1, mp_context=mp.get_context("spawn")) as pool:
        return pool.submit(mine, ground_truth, solution_str).result()
"""
    assert verdict(function(tmp_path, source)) == 1


@pytest.mark.parametrize(
    ("imports", "files"),
    [
        ("import bench_a.judge as judge", {"bench_a/judge.py": "SCORE = NUMBER"}),
        ("from bench_b import judge", {"bench_b/judge.py": "SCORE = NUMBER"}),
        ("import bench_c as judge", {"bench_c.py": "from bench_d import SCORE", "bench_d.py": "SCORE = NUMBER"}),
    ],
)
def test_a_helper_of_another_folder_is_not_taken_for_the_own_one(tmp_path: Path, imports: str, files: dict[str, str]) -> None:
    """In folders without __init__.py, and of helpers: the second file was scored by the first one's."""
    source = f"{imports}\n{HEAD}):\n    return judge.SCORE"
    for number in ("1", "2"):
        for name, content in files.items():
            (tmp_path / number / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / number / name).write_text(content.replace("NUMBER", number))
    assert verdict(function(tmp_path / "1", source)) == 1
    with pytest.raises(
        ConfigError, match=r"imports bench_.*, of which there is .*/2/bench_.*, but .*/1/bench_.* was loaded under this name"
    ):
        verdict(function(tmp_path / "2", source))


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("return None", "returned None; expected a number"),
        ("return []", "returned an empty list"),
        ("return {'scores': 1}", r"returned \['scores'\] without 'score'"),
        ("return 'good'", "returned 'good'; expected a number"),
        ("import numpy; return numpy.zeros(2)", r"returned array\(\[0., 0.\]\); expected a number"),
        ("raise SystemExit(3)", "raised RuntimeError: SystemExit: 3, at line 2"),
        ("raise StopIteration", "raised RuntimeError: StopIteration"),
        ("raise TimeoutError('the judge is slow')", "raised TimeoutError: the judge is slow, at line 2"),
        ("return 1 / 0", "raised ZeroDivisionError: division by zero, at line 2"),
        ("import asyncio; raise asyncio.CancelledError", "CancelledError"),
    ],
)
def test_a_failure_names_function_place_row_and_reason(tmp_path: Path, body: str, why: str, scoring: RewardScoring) -> None:
    reward = function(tmp_path, f"{HEAD}):\n    {body}\n")
    assert math.isnan(verdict(reward)) and reward.counters() == {"timeouts": 0, "errors": 1}
    assert re.fullmatch(rf"{tmp_path}/reward.py:1: compute_score: .*{why}.*for row 'row-7'", reward.last_error), reward.last_error
    queue = RewardScoring([reward])
    set_up(queue, None)
    queue.submit(["18"], [{"prompt": "p", "id": "row-7"}])
    with pytest.raises(RewardError, match=r"FunctionReward: .*reward.py:1: compute_score: .*correct the function") as caught:
        queue.gather()
    assert "server" not in str(caught.value)
    queue.close()


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("def compute_score(answer, truth): ...", {}, r"reward.py:1: compute_score\(answer, truth\) cannot be called: missing.*'answer'"),
        (f"{HEAD}): ...", {"arguments": {"bonus": 1}}, "unexpected keyword argument 'bonus'; it is called with data_source=..., .*bonus"),
        (
            "import no_such_module_of_mine",
            {},
            "reward.py:1: running it raised ModuleNotFoundError: No module named 'no_such_module_of_mine'",
        ),
        ("x = 1\n\n1 / 0", {}, "reward.py:3: running it raised ZeroDivisionError"),
        ("def f(:", {}, "reward.py:1: running it raised SyntaxError"),
        ("import sys\nsys.exit(2)", {}, "reward.py:2: running it raised SystemExit: 2"),
        ("def compute_scores(**row): ...", {}, "defines no function 'compute_score', only compute_scores; did you mean compute_scores?"),
        ("compute_score = 3", {}, "only none at all"),
    ],
)
def test_files_that_cannot_be_used_are_told_before_training(tmp_path: Path, source: str, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        function(tmp_path, source, **options).setup(rank=0, world_size=1, device="cpu")


def test_options_of_functions_that_cannot_be_meant(source: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="arguments: ground_truth is what the row says"):
        FunctionReward(source, arguments={"ground_truth": 1})
    with pytest.raises(ConfigError, match="extras: score is the score itself"):
        FunctionReward(source, extras=["score"])
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match="is no file"):
        FunctionReward(str(tmp_path / "folder"))


def test_an_extra_that_is_missing_does_not_take_the_score_with_it(tmp_path: Path) -> None:
    reward = function(tmp_path, f"{HEAD}):\n    return {{'score': 1, 'speed': None}}", extras=["speed"])
    assert verdict(reward) == 1 and reward.last_error == ""


def test_functions_that_are_not_there(source: str) -> None:
    with pytest.raises(ConfigError, match="is no file"):
        FunctionReward("missing.py")
    with pytest.raises(ConfigError, match=r"defines no function 'score', only compute_score, asynchronous"):
        FunctionReward(source, "score").setup(rank=0, world_size=1, device="cpu")


# ---------------------------------------------------------------------- reward models


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Builds a reward model from a miniature language model; `plain`: it has no chat template, and pads with the end of text."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    def build(*, labels: int = 1, plain: bool = False) -> Path:
        folder = build_lm(tmp_path_factory.mktemp("rm"), hidden=32, chat=not plain)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=labels)
            torch.nn.init.normal_(model.score.weight)
        model.save_pretrained(folder)
        if plain:
            tokenizer = AutoTokenizer.from_pretrained(folder)
            tokenizer.pad_token = END
            tokenizer.save_pretrained(folder)
        return folder

    return build


@torch.no_grad()
def by_hand(folder: Path, text: str, label: int = 0) -> float:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False).input_ids
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    hidden = model.model(torch.tensor([ids])).last_hidden_state[0, -1]
    return float(model.score(hidden)[label])


CONVERSATION = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}, {"role": "user", "content": "why"}]
BEGUN = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "be"}]


def test_a_reward_model_reads_the_whole_conversation_whatever_the_batch(classifier: Callable[..., Path]) -> None:
    folder = classifier()
    parts = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "p"}]}]
    info = [{"prompt": "p"}, {"prompt": CONVERSATION}, {"prompt": parts}, {"prompt": "longer"}, {"prompt": BEGUN}]
    answers = ["a", "because", "abc", "", "cause"]
    expected = [
        f"<|user|>p<|assistant|>a{END}",
        f"<|user|>hi<|assistant|>yes?{END}<|user|>why<|assistant|>because{END}",
        f"<|user|>p<|assistant|>abc{END}",
        f"<|user|>longer<|assistant|>{END}",
        f"<|user|>why<|assistant|>because{END}",
    ]
    wanted = torch.tensor([by_hand(folder, text) for text in expected])
    for size in (1, 3, 16):
        reward = ModelReward(str(folder), batch_size=size)
        reward.setup(rank=0, world_size=1, device="cpu")
        torch.testing.assert_close(reward.score(answers, info)["reward_model"], wanted, rtol=1e-4, atol=1e-5)


def test_the_end_of_text_is_read_where_it_is_also_padding(classifier: Callable[..., Path]) -> None:
    """A decoder's score stands at the last token that is not padding: with padding = end of text that would be the one before."""
    folder = classifier(plain=True, labels=2)
    answers = [f"a{END}", f"abcdef{END}"]
    wanted = torch.tensor([by_hand(folder, "p" + text, label=1) for text in answers])
    scores = ModelReward(str(folder), label=1, name="quality").score(answers, [{"prompt": "p"}] * 2)
    torch.testing.assert_close(scores["quality"], wanted, rtol=1e-4, atol=1e-5)


def test_a_text_that_holds_the_begin_of_text_gets_no_second_one(classifier: Callable[..., Path]) -> None:
    from tokenizers import processors
    from transformers import AutoTokenizer

    folder = classifier(plain=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.bos_token = END
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", special_tokens=[(END, tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(folder)
    wanted = torch.tensor(by_hand(folder, f"{END}pa"))
    for prompt in ("p", f"{END}p"):
        scores = ModelReward(str(folder)).score(["a"], [{"prompt": prompt}])["reward_model"]
        torch.testing.assert_close(scores[0], wanted, rtol=1e-4, atol=1e-5)


def test_conversations_that_are_too_long_lose_their_beginning(classifier: Callable[..., Path]) -> None:
    folder = classifier()
    reward = ModelReward(str(folder), max_length=4)
    scores = reward.score(["abc", "bc"], [{"prompt": "p"}] * 2)["reward_model"]
    torch.testing.assert_close(scores[0], torch.tensor(by_hand(folder, f"abc{END}")), rtol=1e-4, atol=1e-5)
    assert reward.counters() == {"cut": 2.0}


def test_models_that_cannot_be_used(classifier: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no folder of a transformers model"):
        ModelReward(str(tmp_path))
    with pytest.raises(ConfigError, match=r"is no reward model: it has no score.weight"):
        ModelReward(str(build_lm(tmp_path / "lm", hidden=32))).setup(rank=0, world_size=1, device="cpu")
    folder = str(classifier(labels=2))
    with pytest.raises(ConfigError, match="has 2 outputs(?s:.*)set label to the one that is the score"):
        ModelReward(folder).setup(rank=0, world_size=1, device="cpu")
    with pytest.raises(ConfigError, match="label=2: .* has outputs 0 ... 1"):
        ModelReward(folder, label=2).setup(rank=0, world_size=1, device="cpu")


# ---------------------------------------------------------------------- before a run


@pytest.fixture
def scoring() -> Iterator[RewardScoring]:
    made = RewardScoring([RuleReward()], weights={"score": 1.0})
    yield made
    made.close()


def set_up(scoring: RewardScoring, data: object, stage: str = "fit") -> None:
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    scoring.setup(SimpleNamespace(world_size=1, global_rank=0, strategy=strategy, datamodule=data), SimpleNamespace(), stage)  # type: ignore[arg-type]


GOOD = {"prompt": "p", "data_source": "gsm8k", "reward_model": {"ground_truth": "18"}}


def test_rewards_look_at_all_rows_before_training(scoring: RewardScoring, tmp_path: Path) -> None:
    good, bad = jsonl(tmp_path / "good.jsonl", GOOD), jsonl(tmp_path / "bad.jsonl", GOOD, {"prompt": "p"})
    set_up(scoring, TextPrompts(train=good, val=good))
    for stage in ("fit", "validate"):
        with pytest.raises(
            ConfigError, match=r"^1 prompts whose answers nobody can score\n  \S*bad.jsonl:2: data_source 'bad' has no rule"
        ):
            set_up(scoring, TextPrompts(train=good, val=bad), stage)
    with pytest.raises(ConfigError, match="bad.jsonl:2: "):
        set_up(scoring, TextPrompts(train=bad), "fit")
    set_up(scoring, TextPrompts(train=bad, val=good), "validate")


def test_preferences_need_no_score(scoring: RewardScoring, tmp_path: Path) -> None:
    set_up(scoring, PromptsAndPairs(train=jsonl(tmp_path / "x.jsonl", GOOD, {"prompt": "p", "chosen": "a", "rejected": "b"})))
    with pytest.raises(ConfigError, match=r"y.jsonl:2: data_source 'y' has no rule"):
        set_up(scoring, PromptsAndPairs(train=jsonl(tmp_path / "y.jsonl", GOOD, {"prompt": "p"})))


def test_scores_come_through_the_callback(scoring: RewardScoring) -> None:
    set_up(scoring, None)
    for answer in ("#### 18", "#### 17"):
        scoring.submit([answer], [GOOD])
    scores = scoring.gather()
    assert scores["score"].tolist() == scores["acc"].tolist() == [1, 0] and scores["parsed"].tolist() == [1, 1]
