"""The progress display: a bar that moves through rollout, rewards and training on a terminal, lines in a log."""

import io
import re
import sys
from pathlib import Path

import pytest
from toy import ToyData, toy_method, toy_trainer

from callbacks.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(folder: Path, monkeypatch: pytest.MonkeyPatch, out: io.StringIO, progress: Progress, **kwargs: object) -> list[str]:
    """Everything a run of a warm-up and 2 iterations with one evaluation writes, a line per state of the bar."""
    monkeypatch.setattr(sys, "stdout", out)
    trainer = toy_trainer(
        folder, callbacks=[progress], max_epochs=3, limit_val_batches=1.0, check_val_every_n_epoch=2, enable_progress_bar=True, **kwargs
    )
    trainer.fit(toy_method(updates_per_iteration=3, warmup_steps=3), ToyData())
    return [line.strip() for line in re.split(r"[\r\n]+|\x1b\[A", out.getvalue()) if line.strip()]


def test_lines_in_a_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line per iteration, evaluation where there was one, no bars and no control characters."""
    out = io.StringIO()
    lines = shown(tmp_path, monkeypatch, out, Progress())
    assert "\r" not in out.getvalue() and "\x1b" not in out.getvalue()
    number = r"-?[\d.e-]+"
    patterns = [
        rf"warm-up:  warmup/loss {number}  \([\d.]+ s\)",
        rf"iteration 1/2:  reward_mean {number}  val/brightness {number}  loss {number}  \([\d.]+ s\)",
        rf"iteration 2/2:  reward_mean {number}  loss {number}  \([\d.]+ s\)",
    ]
    assert len(lines) == 3 and all(re.fullmatch(pattern, line) for pattern, line in zip(patterns, lines)), lines


def test_lines_by_optimizer_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """3 steps of warm-up and 3 of each iteration are 9; the reward is the iteration's, an evaluation's score stands in its line."""
    lines = shown(tmp_path, monkeypatch, io.StringIO(), Progress(line="step"))
    number = r"-?[\d.]+(?:e-\d+)?"
    patterns = [
        r"warm-up: .*",
        rf"Step 6/9 \| Loss: {number} \| Reward: {number} \| val/brightness: {number}.* \| LR: {number}",
        rf"Step 9/9 \| Loss: {number} \| Reward: {number} \| LR: {number}",
    ]
    assert len(lines) == 3 and all(re.fullmatch(pattern, line) for pattern, line in zip(patterns, lines)), lines


def test_long_iterations_show_life_in_a_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(tmp_path, monkeypatch, io.StringIO(), Progress(seconds_between_lines=0))
    rollout = [line for line in lines if line.startswith("iteration 2/2: rollout")]
    assert rollout == ["iteration 2/2: rollout 6/16 images", "iteration 2/2: rollout 12/16 images", "iteration 2/2: rollout 16/16 images"]
    assert sum(line.startswith("iteration 2/2: minibatch") for line in lines) == 3
    assert [line for line in lines if line.startswith("evaluation")] == [f"evaluation: batch {i}/3" for i in (1, 2, 3)]


def test_the_bar_moves_through_all_of_an_iteration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = shown(tmp_path, monkeypatch, Terminal(), Progress())
    second = [state for state in states if state.startswith("iteration 2/2")]
    order = [re.match(r"iteration 2/2 ?(\w*)", state).group(1) for state in second]  # type: ignore[union-attr]
    seen = list(dict.fromkeys(order))
    assert seen == ["", "rollout", "waiting", "training"]
    assert any("6/16" in state and "images/s" in state for state in second if " rollout" in state)
    training = [state for state in second if " training" in state]
    assert any("3/3" in state and "reward_mean=" in state for state in training)
    assert not any("loss=" in state for state in second), "the loss of another iteration"
    assert any(re.fullmatch(r"iteration 1/2:  reward_mean .* s\)", state) for state in states), "the line that stays"
    assert not any("v_num" in state for state in states)


def test_can_be_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for out in (io.StringIO(), Terminal()):
        assert shown(tmp_path, monkeypatch, out, Progress(refresh_rate=0)) == []


def test_predict_works_without_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    trainer = toy_trainer(tmp_path, callbacks=[Progress()], enable_progress_bar=True)
    assert len(trainer.predict(toy_method(), ToyData())) == 3
