"""Seconds add up, and each goes to what caused it."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from torch import Tensor
from toy import Brightness, ToyData, ToyPolicy, toy_method, toy_trainer

from callbacks.throughput import Clock, Throughput, plot_time
from lit_rl.types import Info

DECODE, SCORE, STEP = 0.1, 0.5, 0.05


class SlowPolicy(ToyPolicy):
    def decode(self, x: Tensor) -> Tensor:
        time.sleep(DECODE)
        return super().decode(x)


class SlowReward(Brightness):
    def score(self, media: Tensor, info: Sequence[Info]) -> Mapping[str, Tensor]:
        time.sleep(SCORE)
        return super().score(media, info)


class SlowStep(L.Callback):
    def on_before_optimizer_step(self, *_: Any) -> None:
        time.sleep(STEP)


class Ruler(L.Callback):
    """How long each epoch took. It stands right before Throughput, so that both look at the clock at the same moments."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_start(self, *_: Any) -> None:
        self.since = time.perf_counter()

    def on_train_epoch_end(self, *_: Any) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self.since)
        self.since = now


class Rows(L.Callback):
    """Logged values of each epoch, and how long it really took."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.ruler = Ruler()

    @property
    def seconds(self) -> list[float]:
        return self.ruler.seconds

    def on_train_epoch_end(self, trainer: L.Trainer, module: Any) -> None:
        self.rows.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(("time/", "throughput/"))})


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """A warm-up, then 2 iterations: 16 images in 3 chunks, 48 pairs in 3 steps, evaluation of 3 batches in the last one."""
    rows = Rows()
    trainer = toy_trainer(
        tmp_path_factory.mktemp("run"), callbacks=[rows.ruler, Throughput(), rows, SlowStep()], rewards={"brightness": SlowReward()},
        max_epochs=3, limit_val_batches=1.0, check_val_every_n_epoch=3,
    )  # fmt: skip
    module = toy_method(updates_per_iteration=3, warmup_steps=3)
    module.policy = SlowPolicy()
    trainer.fit(module, ToyData())
    return rows


def test_phases_add_up_to_the_iteration(rows: Rows) -> None:
    for row, seconds in zip(rows.rows, rows.seconds, strict=True):
        assert sum(value for name, value in row.items() if name.startswith("time/")) == pytest.approx(seconds, abs=0.1)


def test_time_goes_to_what_caused_it(rows: Rows) -> None:
    """Scoring of the first two chunks overlaps with sampling; the last one is waited for."""
    warmup, first, last = rows.rows
    assert warmup["time/rollout_s"] == warmup["time/score_s"] == 0 and warmup["time/train_s"] >= 3 * STEP
    for row in (first, last):
        assert row["time/rollout_s"] >= 3 * DECODE and row["time/score_s"] >= SCORE - 3 * DECODE and row["time/train_s"] >= 3 * STEP
    assert "time/validation_s" not in first and last["time/validation_s"] >= 3 * DECODE


def test_rates_are_counts_over_times(rows: Rows) -> None:
    """48 pairs: 16 images, of which the first 3 of 4 steps are trained (`timestep_fraction` 0.99)."""
    for row, seconds in zip(rows.rows[1:], rows.seconds[1:]):
        assert row["throughput/images_per_s"] == pytest.approx(16 / seconds, rel=0.1)
        assert row["throughput/pairs_per_s"] * row["time/train_s"] == pytest.approx(48, rel=1e-3)
    assert not any(name.startswith("throughput/") for name in rows.rows[0])


def test_clock_counts_one_phase_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([10.0, 11.0, 13.0, 16.0, 20.0, 25.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(moments))
    clock = Clock()
    for phase in ("a", "b", "a"):
        clock.enter(phase)
    assert clock.restart() == {"other": 1.0, "a": 2.0 + 4.0, "b": 3.0}
    assert clock.restart() == {"other": 5.0}


def test_picture_of_the_time(rows: Rows, tmp_path: Path) -> None:
    from PIL import Image

    plot_time([*rows.rows, {"loss": 1.0}], tmp_path / "time.png")
    assert Image.open(tmp_path / "time.png").size == (960, 420)
