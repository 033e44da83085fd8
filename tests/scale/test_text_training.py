"""Language models train on two processes as on one, and exactly when continued, by every method."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import text_runs
import torch
import toy_text
from comparing import Alone, distance, ended
from pair import Pair, RemoteError

pytestmark = pytest.mark.slow

SHARDED = [("fsdp2", "dpo"), ("fsdp2", "ppo"), ("fsdp2", "gspo")]
"""Those with a reference, with two models, and with rows of two kinds."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(toy_text.model_folder(tmp_path_factory.mktemp("lm"), layers=2))


Written = Callable[..., tuple[Path, list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def written(pair: Pair, model: str, tmp_path_factory: pytest.TempPathFactory) -> Written:
    """written(strategy=, method=, lora=): folder of a run on two processes that saves every step, made once, and what they returned."""

    @cache
    def run(strategy: str, method: str, lora: bool) -> tuple[Path, list[dict[str, Any]]]:
        out = tmp_path_factory.mktemp("written")
        return out, pair.run("text_runs.fit", model=model, out=str(out), strategy=strategy, method=method, lora=lora, save=True)

    return run


@pytest.mark.parametrize(("strategy", "method"), [*(("ddp", method) for method in text_runs.METHODS), *SHARDED])
def test_two_processes_train_as_one_does(written: Written, alone: Alone, model: str, strategy: str, method: str) -> None:
    """Two steps in each of three iterations; one process cuts a step into three micro-batches."""
    single, one = alone(partial(text_runs.fit, model), method=method, parts=3)
    folder, two = written(strategy=strategy, method=method, lora=False)
    assert [run["steps"] for run in two] == [6, 6] == [one["steps"]] * 2
    assert sorted(two[0]["groups"] + two[1]["groups"]) == one["groups"] == list(range(8))
    for run in two:
        assert run["metrics"] == pytest.approx(one["metrics"], abs=1e-5)
    assert [run["held"] for run in two] == pytest.approx([0.5 if strategy == "fsdp2" else 1.0] * 2, abs=0.02)
    a, b = ended(single), ended(folder)
    assert distance(a["weights"], b["weights"]) < 1e-6 and distance(a["average"], b["average"]) < 1e-6
    loaded = toy_text.policy(Path(model))
    loaded.load()
    assert distance(dict(loaded.named_parameters()), {n: a["weights"][f"policy.{n}"] for n, _ in loaded.named_parameters()}) > 0.01


def test_processes_keep_step_where_one_has_nothing_to_answer(pair: Pair, tmp_path: Path, model: str) -> None:
    """One row in sixteen is answered: one or none in an iteration of eight."""
    one = text_runs.fit(model, str(tmp_path / "one"), "one", method="gspo", pairs=16)
    two = pair.run("text_runs.fit", model=model, out=str(tmp_path / "two"), strategy="fsdp2", method="gspo", pairs=16)
    assert two[0]["metrics"] == pytest.approx(one["metrics"], abs=1e-5) and one["metrics"]["gspo/self_play_rows"] < 2
    assert distance(ended(tmp_path / "one")["weights"], ended(tmp_path / "two")["weights"]) < 1e-6


@pytest.mark.parametrize(("strategy", "method"), [("zero2", "dapo"), ("zero3", "ppo")])
def test_deepspeed_trains_as_one_process_does(pair: Pair, alone: Alone, tmp_path: Path, model: str, strategy: str, method: str) -> None:
    """Without what DeepSpeed cannot: clip two models apart, and leave one as it is for a while."""
    plain: dict[str, Any] = dict(method=method, clip=None)
    if method == "ppo":
        plain["settings"] = dict(critic_training=dict(lr=1e-2))
    single, one = alone(partial(text_runs.fit, model), parts=3, **plain)
    two = pair.run("text_runs.fit", model=model, out=str(tmp_path / "two"), strategy=strategy, **plain)
    assert two[0]["metrics"] == pytest.approx(one["metrics"], abs=1e-5)
    assert distance(ended(single)["weights"], ended(tmp_path / "two")["weights"]) < 1e-6


@pytest.mark.parametrize("setting", [dict(method="ppo"), dict(method="dapo", settings=dict(dynamic_sampling=dict(on_limit="skip_step")))])
def test_deepspeed_does_not_leave_weights_alone(pair: Pair, tmp_path: Path, model: str, setting: dict[str, Any]) -> None:
    with pytest.raises(RemoteError, match="which DeepSpeed's optimizer cannot"):
        pair.run("text_runs.fit", model=model, out=str(tmp_path), strategy="zero2", **setting)


@pytest.mark.parametrize(("strategy", "method"), [("ddp", "sft"), ("ddp", "grpo"), ("ddp", "dapo"), *SHARDED])
def test_resume_equals_the_unbroken_run(pair: Pair, written: Written, tmp_path: Path, model: str, strategy: str, method: str) -> None:
    """Inside the second iteration, and at its end where no weight is split."""
    settings: dict[str, Any] = dict(strategy=strategy, method=method, lora=method in ("ppo", "gspo"))
    whole, _ = written(**settings)
    unbroken = ended(whole)
    for name in ("epoch=1-step=3", "epoch=1-step=4") if strategy == "ddp" else ("epoch=1-step=3",):
        pair.run("text_runs.fit", model=model, out=str(tmp_path / name), ckpt_path=str(whole / f"{name}.ckpt"), **settings)
        continued = ended(tmp_path / name)
        for kind in ("weights", "average"):
            assert continued[kind].keys() == unbroken[kind].keys()
            assert all(torch.equal(continued[kind][n], unbroken[kind][n]) for n in unbroken[kind]), (name, kind)
