"""Evaluation sets beside a run: their images, the judge, what is missing, and that training does not notice."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_judge import Asked, FakeJudge
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from rewards.fault_proxy import Fault
from test_sample_gallery import TakesImages
from toy import Metrics, ToyData, toy_method, toy_trainer, weights

from callbacks.evaluation_sets import EvaluationSets, SetDefaults
from lit_rl.errors import ConfigError
from lit_rl.evaluation.judging import MODEL
from lit_rl.modules.pictures import Evaluation
from lit_rl.rewards.judges.client import Judge
from lit_rl.samplers.flow import SDE


def brightness_judge(asked: Asked) -> str:
    """Every testpoint is fulfilled in a picture that is brighter than middle grey, but for the prompt "2", of which it says nothing."""
    count = len(json.loads(re.findall(r"Testpoints: (\[.*\])", asked.text)[0].replace("'", '"')))
    if "「2」" in asked.text:
        return "I cannot say."
    scores = [int(asked.images[0].mean() > 127)] * count
    return f"<description><analysis>{['seen'] * count}</analysis><score>{scores}</score></description>"


@pytest.fixture()
def yaml(tmp_path: Path) -> str:
    rows = [{"prompt": str(i), "index": 10 + i, "sub_dims": {"Testpoints": ["Style", "Attribute - Color"][: 1 + i % 2]}} for i in range(3)]
    (tmp_path / "bench.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "plain.txt").write_text("4\n5\n")
    (tmp_path / "eval.yaml").write_text(
        "datasets:\n- {name: bench, path: bench.jsonl, duplicates: 2, num_inference_steps: 2, scoring: unigenbench/en}\n"
        "- {name: plain, path: plain.txt, cfg_scale: 2.5}\n"
    )
    return str(tmp_path / "eval.yaml")


def callback(yaml: str, judge: FakeJudge, folder: Path, **options: Any) -> EvaluationSets:
    own = Judge(urls=judge.url, temperature=None, timeout_s=60, deadline_s=60)
    return EvaluationSets(yaml, judge=own, defaults=SetDefaults(num_steps=3), folder=str(folder / "eval"), **options)


def fitted(folder: Path, sets: EvaluationSets | None, *, held_out: int = 0, **trainer: Any) -> tuple[Any, dict[str, float]]:
    method, metrics = toy_method(), Metrics()
    run = toy_trainer(
        folder, callbacks=[*([sets] if sets else []), metrics], **{"limit_val_batches": 1.0, "check_val_every_n_epoch": 2} | trainer
    )
    run.fit(method, ToyData(held_out=held_out))
    return method, metrics.rows[-1]


def images(folder: Path) -> dict[str, list[int]]:
    return {str(file.relative_to(folder)): list(Image.open(file).convert("L").getdata()) for file in sorted(folder.rglob("*.png"))}


def test_each_image_is_written_and_judged_once_and_training_does_not_notice(tmp_path: Path, yaml: str) -> None:
    logger = TakesImages()
    with FakeJudge(brightness_judge, model=MODEL) as judge:
        method, logged = fitted(tmp_path, callback(yaml, judge, tmp_path, max_images=3), held_out=2, logger=logger)
    assert torch.equal(weights(method), weights(fitted(tmp_path / "without", None, held_out=2)[0]))
    assert method.policy.guidance_scale == 1.0

    step = tmp_path / "eval/step_2"
    assert list(images(tmp_path / "eval")) == [
        *(f"step_2/bench/{index}.{duplicate}.png" for index in (10, 11, 12) for duplicate in (0, 1)),
        *(f"step_2/plain/{index}.0.png" for index in (0, 1)),
    ]  # fmt: skip
    assert len(judge.asked) == 6 and "temperature" not in judge.asked[0].body
    with open(step / "bench/unigenbench_scores.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert all((row["reason"] == "") == (row["status"] == "judged") for row in table)
    for row in table:
        grey = images(step / "bench")[row["file"]]
        bright = int(sum(grey) / len(grey) > 127)
        expected = None if row["prompt"] == "2" else [bright] * len(json.loads(row["testpoints"]))
        assert json.loads(row["scores"]) == expected and row["status"] == ("unreadable" if row["prompt"] == "2" else "judged")

    told = [score for row in table if row["status"] == "judged" for score in json.loads(row["scores"])]
    assert logged["eval/bench/overall_accuracy"] == pytest.approx(sum(told) / len(told)) and len(told) == 2 * (1 + 2)
    assert logged["eval/bench/unreadable"] == 2 and logged["eval/bench/success_rate"] == pytest.approx(4 / 6)
    assert 0 <= logged["eval/bench/Attribute.Attribute-Color"] <= 1 and logged["val/brightness"] > 0
    summary = json.loads((step / "bench/unigenbench_summary.json").read_text())
    assert summary["total_count"] == 6 and summary["unreadable"] == 2 and summary["unreadable_counts_as"] == "missing"
    assert [(call["key"], len(call["images"])) for call in logger.calls] == [("eval/bench", 3), ("eval/plain", 2)]


def test_validate_makes_the_images_of_the_checkpoint_again(tmp_path: Path, yaml: str) -> None:
    """After a fit without held-out prompts of its own, in a folder named by the iterations that are over."""
    saved = ModelCheckpoint(dirpath=tmp_path, filename="saved")
    with FakeJudge(brightness_judge, model=MODEL) as judge:
        method, trainer = (
            toy_method(),
            toy_trainer(
                tmp_path,
                callbacks=[callback(yaml, judge, tmp_path), saved],
                limit_val_batches=1.0,
                check_val_every_n_epoch=2,
                enable_checkpointing=True,
            ),
        )
        trainer.fit(method, ToyData(held_out=0))
        again = toy_trainer(tmp_path, callbacks=[callback(yaml, judge, tmp_path / "again")], limit_val_batches=1.0)
        (told,) = again.validate(toy_method(), ToyData(held_out=0), ckpt_path=tmp_path / "saved.ckpt", verbose=False)[:1]
    assert images(tmp_path / "again/eval") == images(tmp_path / "eval") != {}
    assert told["eval/bench/overall_accuracy"] == float(trainer.callback_metrics["eval/bench/overall_accuracy"])


def test_stochastic_images_differ_and_are_the_same_each_time(tmp_path: Path, yaml: str) -> None:
    found = []
    with FakeJudge(brightness_judge, model=MODEL) as judge:
        for name, sde in (("ode", None), ("one", SDE(noise_level=0.9)), ("two", SDE(noise_level=0.9))):
            fitted(tmp_path / name, callback(yaml, judge, tmp_path / name, sde=sde), max_epochs=1, check_val_every_n_epoch=1)
            found.append(images(tmp_path / name / "eval"))
    assert found[1] == found[2] != found[0] and len(found[0]) == 8


def test_guidance_of_a_set_or_of_the_model_holds_while_it_is_rendered(tmp_path: Path, yaml: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import toy

    seen: list[float] = []
    velocity = toy.ToyPolicy.velocity
    monkeypatch.setattr(toy.ToyPolicy, "velocity", lambda self, *a: seen.append(self.guidance_scale) or velocity(self, *a))
    with FakeJudge(brightness_judge, model=MODEL) as judge:
        run = toy_trainer(tmp_path, callbacks=[callback(yaml, judge, tmp_path)], limit_val_batches=1.0)
        run.validate(toy_method(evaluation=Evaluation(guidance_scale=4.0)), ToyData(held_out=0), verbose=False)
    assert seen.count(4.0) == 3 * 2 and seen.count(2.5) == 3 and len(seen) == 9  # three batches of two steps, one of three


@pytest.mark.parametrize(("fault", "unreadable", "accuracy"), [("status", "missing", None), ("garbage", "wrong", 0.0)])
def test_a_judge_that_fails_leaves_images_missing_and_the_run_goes_on(
    tmp_path: Path, yaml: str, fault: str, unreadable: Any, accuracy: float | None
) -> None:
    with (
        FakeJudge(brightness_judge, [Fault(fault, status=400)] * 60, model=MODEL) as judge,
        pytest.warns(UserWarning, match="6 have no answer"),
    ):
        _, logged = fitted(tmp_path, callback(yaml, judge, tmp_path, unreadable=unreadable))
    assert logged["eval/bench/unanswered"] == 6 and logged.get("eval/bench/overall_accuracy") == accuracy
    assert (tmp_path / "eval/step_2/bench/unigenbench_scores.csv").read_text().count("no_answer") == 6


def test_an_image_that_is_not_finite_is_missing(tmp_path: Path, yaml: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import toy

    def with_nan(self: toy.ToyPolicy, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        images, finite = super(toy.ToyPolicy, self).picture(x)
        return images, finite & (torch.arange(len(x)) != 1)

    monkeypatch.setattr(toy.ToyPolicy, "picture", with_nan)
    with FakeJudge(brightness_judge, model=MODEL) as judge, pytest.warns(UserWarning, match="3 are missing"):
        run = toy_trainer(tmp_path, callbacks=[callback(yaml, judge, tmp_path)], limit_val_batches=1.0)
        (told,) = run.validate(toy_method(), ToyData(held_out=0), verbose=False)[:1]
    assert told["eval/bench/missing_images"] == 3 == len(judge.asked)  # the second image of each of three batches
    assert not (tmp_path / "eval/step_0/bench/10.1.png").exists()


WRONG: dict[str, Callable[[Path, str, str], EvaluationSets]] = {
    r"serves other, not UniGen.*judge.model": lambda folder, yaml, url: EvaluationSets(yaml, judge=Judge(urls=url)),
    r"nowhere.yaml: cannot be read": lambda folder, yaml, url: EvaluationSets(str(folder / "nowhere.yaml")),
    r"refused|Cannot connect": lambda folder, yaml, url: EvaluationSets(yaml, judge=Judge(urls="127.0.0.1:9")),
}


@pytest.mark.parametrize("sentence", WRONG)
def test_what_cannot_work_is_told_before_the_model_is_loaded(tmp_path: Path, yaml: str, sentence: str) -> None:
    method = toy_method()
    with FakeJudge(brightness_judge, model="other") as judge, pytest.raises(ConfigError, match=sentence):
        toy_trainer(tmp_path, callbacks=[WRONG[sentence](tmp_path, yaml, judge.url)]).fit(method, ToyData())
    assert not hasattr(method.policy, "network")


def test_the_environment_names_the_sets_and_without_them_nothing_happens(
    tmp_path: Path, yaml: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(tmp_path / "eval")
    fitted(tmp_path, EvaluationSets(folder=folder), max_epochs=1, held_out=1)
    assert not Path(folder).exists()
    Path(yaml).write_text("datasets: [{name: plain, path: plain.txt, num_inference_steps: 1}]")
    monkeypatch.setenv("EVAL_DATASET_CONFIG", yaml)
    fitted(tmp_path, EvaluationSets(folder=folder), max_epochs=1, check_val_every_n_epoch=1)
    assert len(images(Path(folder))) == 2
