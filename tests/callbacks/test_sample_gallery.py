"""The gallery shows the right images with the right captions, in files and in every logger that takes images."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toy import ToyData, toy_method, toy_trainer

from callbacks.learning_rate import LearningRate
from callbacks.sample_gallery import PICTURE, SampleGallery, caption, contact_sheet, spread
from lit_rl.errors import ConfigError


class TakesImages(Logger):
    """As W&B's and SwanLab's loggers do."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[dict[str, Any]] = []

    name, version = "takes-images", 0

    def log_image(self, **call: Any) -> None:
        self.calls.append(call)

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        pass

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TakesImages]:
    """4 iterations, evaluation in every second one."""
    folder, logger = tmp_path_factory.mktemp("run"), TakesImages()
    gallery = SampleGallery(max_images=4, every_n_iterations=3, folder=str(folder / "gallery"))
    loggers = [logger, TensorBoardLogger(folder, name="tb", version=""), CSVLogger(folder, name="csv", version="")]
    trainer = toy_trainer(
        folder, callbacks=[gallery], logger=loggers, max_epochs=4, limit_val_batches=1.0, check_val_every_n_epoch=2, num_sanity_val_steps=1
    )
    trainer.fit(toy_method(), ToyData())
    return folder, logger


def test_when_it_shows(run: tuple[Path, TakesImages]) -> None:
    folder, logger = run
    assert sorted(p.name for p in (folder / "gallery").iterdir()) == [
        "evaluation-000002.png", "evaluation-000004.png", "rollout-00001.png", "rollout-00004.png",
    ]  # fmt: skip
    assert [(call["key"], call["step"]) for call in logger.calls] == [
        ("samples/rollout", 0), ("samples/evaluation", 1), ("samples/rollout", 3), ("samples/evaluation", 3),
    ]  # fmt: skip


def test_captions_belong_to_their_images(run: tuple[Path, TakesImages]) -> None:
    """The reward is the image's brightness, so the caption can be checked against the pixels."""
    for call in run[1].calls:
        assert len(call["images"]) == len(call["caption"]) == 4
        for image, text in zip(call["images"], call["caption"]):
            prompt, reward = text.split("\n")
            assert reward == f"brightness {np.asarray(image).mean() / 255:.3g}"
            assert 0 <= int(prompt) < 6 if call["key"] == "samples/rollout" else 6 <= int(prompt) < 11


def test_a_rollout_is_shown_across_its_prompts(run: tuple[Path, TakesImages]) -> None:
    """16 images, 4 of each prompt: of 4 shown, one of each."""
    prompts = [text.split("\n")[0] for text in run[1].calls[0]["caption"]]
    assert len(set(prompts)) == 4


def test_tensorboard_gets_the_sheet(run: tuple[Path, TakesImages]) -> None:
    folder, _ = run
    events = EventAccumulator(str(folder / "tb"), size_guidance={"images": 0}).Reload()
    assert [image.step for image in events.Images("samples/evaluation")] == [1, 3]
    shown = events.Images("samples/rollout")[0]
    assert (shown.width, shown.height) == Image.open(folder / "gallery" / "rollout-00001.png").size


def test_small_images_are_enlarged_and_nothing_is_smoothed() -> None:
    colours = torch.randint(0, 256, (3, 2, 3), dtype=torch.uint8)
    sheet = np.asarray(contact_sheet([colours], ["a prompt\nreward 1"]))
    factor = PICTURE // 2
    picture = sheet[: 2 * factor, 4 : 4 + 3 * factor]
    assert (picture[::factor, ::factor] == colours.permute(1, 2, 0).numpy()).all()
    assert (picture == picture[::factor, ::factor].repeat(factor, 0).repeat(factor, 1)).all()


def test_text_stays_beneath_its_picture() -> None:
    """Without captions the sheet is white where with long ones it is not; beside the pictures it is white in both."""
    images = [torch.zeros(3, 160, 160, dtype=torch.uint8)] * 2
    for text in ("word " * 100, "x" * 300, "写着你好的牌子" * 20):
        sheet = np.asarray(contact_sheet(images, [f"{text}\nocr 0.512  clip 27.1", "\n"]))
        assert (sheet[160:, :168] < 250).any() and (sheet[160:, 168:] > 250).all()
        assert (sheet[-3:] > 250).all(), "cut off at the bottom"


@pytest.mark.parametrize("total, count, rows", [(16, 4, {0, 4, 8, 12}), (3, 8, {0, 1, 2}), (5, 2, {0, 2}), (0, 4, set())])
def test_spread(total: int, count: int, rows: set[int]) -> None:
    assert spread(total, count) == rows


def test_a_missing_score_is_shown_as_missing() -> None:
    assert caption({"prompt": "a cat"}, {"ocr": float("nan"), "clip": 0.25}) == "a cat\nocr nan  clip 0.25"


@pytest.mark.parametrize("wrong", [dict(max_images=0), dict(every_n_iterations=0)])
def test_impossible_settings_are_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        SampleGallery(**wrong)


@pytest.mark.parametrize(("accumulate", "warmup"), [(1, 0), (2, 3)])
def test_pictures_stand_beside_their_numbers(tmp_path: Path, accumulate: int, warmup: int) -> None:
    """In TensorBoard pictures of a rollout have the step of its rewards, those of an evaluation that of its scores, learning rates one
    point a step."""
    method = toy_method(updates_per_iteration=3, inner_epochs=3, warmup_steps=warmup)
    trainer = toy_trainer(
        tmp_path, callbacks=[SampleGallery(every_n_iterations=1), LearningRate()], logger=TensorBoardLogger(tmp_path, name="", version=""),
        max_epochs=3, limit_val_batches=1.0, check_val_every_n_epoch=1, accumulate_grad_batches=accumulate,
    )  # fmt: skip
    trainer.fit(method, ToyData())
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0, "scalars": 0}).Reload()
    steps = {tag: [event.step for event in events.Scalars(tag)] for tag in ("reward_mean", "val/brightness", "lr-AdamW")}
    assert [image.step for image in events.Images("samples/rollout")] == steps["reward_mean"]
    assert [image.step for image in events.Images("samples/evaluation")] == steps["val/brightness"]
    assert steps["lr-AdamW"] == list(range(trainer.global_step))
