"""`predict` leaves a folder of images and a list that says which prompt each of them shows."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from toy import ToyData, toy_method, toy_trainer

from callbacks.image_writer import ImageWriter, slug, to_image


def test_predict_writes_every_prompt_once(tmp_path: Path) -> None:
    """5 prompts in batches of 2; the pixels are those that the method rendered."""
    trainer, module = toy_trainer(tmp_path, callbacks=[ImageWriter(str(tmp_path / "images"))]), toy_method()
    batches = trainer.predict(module, ToyData())
    rows = [json.loads(line) for line in (tmp_path / "images" / "prompts.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["6", "7", "8", "9", "10"] and [row["index"] for row in rows] == list(range(5))
    assert {p.name for p in (tmp_path / "images").glob("*.png")} == {row["file"] for row in rows}
    media = torch.cat([batch["media"] for batch in batches])
    for row, image in zip(rows, media, strict=True):
        pixels = torch.from_numpy(np.array(Image.open(tmp_path / "images" / row["file"])))
        assert torch.equal(pixels.permute(2, 0, 1), image)


def test_does_nothing_outside_predict(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, callbacks=[ImageWriter(str(tmp_path / "images"))], limit_val_batches=1.0)
    trainer.fit(toy_method(), ToyData())
    trainer.validate(toy_method(), ToyData())
    assert not (tmp_path / "images").exists()


@pytest.mark.parametrize(
    "text, name",
    [
        ('A sign that says "Hello, World!"', "a-sign-that-says-hello-world"),
        ("../../etc/passwd", "etc-passwd"),
        ("写着 你好 的 牌子", "写着-你好-的-牌子"),
        ("???", "prompt"),
        ("x" * 500, "x" * 48),
    ],
)
def test_slugs_are_safe_file_names(text: str, name: str) -> None:
    assert slug(text) == name


def test_channels_become_colours() -> None:
    image = to_image(torch.tensor([255, 0, 7], dtype=torch.uint8).view(3, 1, 1).expand(3, 2, 5))
    assert image.size == (5, 2) and image.getpixel((4, 1)) == (255, 0, 7)
