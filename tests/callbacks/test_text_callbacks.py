"""The display and the files of a language model's answers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_text import Digits, Sorted, model_folder, policy, trainer

from callbacks.image_writer import ImageWriter
from callbacks.reward_scoring import RewardScoring
from callbacks.sample_texts import SampleTexts, prompt_text
from callbacks.text_writer import TextWriter
from callbacks.throughput import Throughput
from lit_rl.methods.grpo import GRPO
from lit_rl.rollouts.answers import Answers
from lit_rl.rollouts.base import Sampling


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("lm"))


def method(folder: Path) -> GRPO:
    return GRPO(policy(folder), prompts_per_iteration=4, group_size=2, answers=Answers(sampling=Sampling(max_new_tokens=4)))


def test_predict_writes_every_answer_in_order_and_no_images(folder: Path, tmp_path: Path) -> None:
    writers = [TextWriter(str(tmp_path / "out/answers.jsonl")), ImageWriter(str(tmp_path / "images"))]
    batches = trainer(callbacks=writers).predict(method(folder), datamodule=Digits(held_out=18))
    rows = [json.loads(line) for line in (tmp_path / "out/answers.jsonl").read_text().splitlines()]
    assert [row["response"] for row in rows] == [text for batch in batches for text in batch["texts"]] and len(rows) == 18
    assert [row["prompt"] for row in rows] == [info["prompt"] for batch in batches for info in batch["prompts"].info]
    assert not (tmp_path / "images").exists()


def test_samples_are_shown_with_their_own_scores(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Board:
        def __init__(self) -> None:
            self.shown: list[tuple[str, str]] = []

        def add_text(self, key: str, text: str, step: int) -> None:
            self.shown.append((key, text))

    samples, board = SampleTexts(3, max_characters=4), Board()
    run = trainer(callbacks=[RewardScoring({"sorted": Sorted()}), samples], max_epochs=1, check_val_every_n_epoch=1)
    run.loggers = [type("Logger", (), {"experiment": board})()]
    learner = method(folder)
    samples.on_rollout_chunk(run, learner, ["1|2", "3\n4", "55555555"], [{"prompt": "21="}, {"prompt": "43="}, {"prompt": "5="}], 3)
    samples.on_rollout_end(run, learner, type("R", (), {"rewards": {"exact": torch.tensor([1.0, 0.5, 0.25])}}))
    [(key, table)] = board.shown
    assert key == "samples/rollout"
    assert table.splitlines()[2:] == [
        "| 21= | 1&#124;2 | exact 1 |",
        "| 43= | 3<br>4 | exact 0.5 |",
        "| 5= | 55 [...] 55 | exact 0.25 |",
    ]
    assert capsys.readouterr().out.splitlines()[1] == "  '43=' -> '3\\n4'  exact 0.5"


def test_a_run_says_answers_and_tokens(folder: Path) -> None:
    logged: dict[str, Any] = {}
    run = trainer(callbacks=[RewardScoring({"sorted": Sorted()}), SampleTexts(), Throughput()], max_epochs=1, check_val_every_n_epoch=1)
    run.fit(method(folder), datamodule=Digits())
    logged = run.callback_metrics
    assert logged["throughput/answers_per_s"] > 0 and logged["throughput/tokens_per_s"] > 0
    assert not [name for name in logged if "images" in name or "pairs" in name]


def test_a_conversation_is_told_turn_by_turn() -> None:
    assert prompt_text([{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]) == "system: be brief\nuser: hi"
    seen = [{"type": "image"}, {"type": "text", "text": "which?"}]
    assert prompt_text([{"role": "user", "content": seen}, {"role": "assistant"}]) == "user: <image>which?\nassistant: "
