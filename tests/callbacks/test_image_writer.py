"""`predict` leaves a folder of images and a list that says which prompt each of them shows."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from toy import ToyData, toy_method, toy_trainer

from callbacks.image_writer import ImageWriter, slug, to_image, triptych
from lit_rl.errors import ConfigError


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


class SignData(ToyData):
    """Held-out prompts that have an id, or the images of an inpainting item."""

    def __init__(self, *, images: bool) -> None:
        super().__init__()
        rows: list[dict[str, Any]] = [dict(row, id=f"sign-{i}") for i, row in enumerate(self.held_out)]
        if images:
            shown = {"source": torch.zeros(3, 2, 2, dtype=torch.uint8), "mask": torch.full((2, 2), 255, dtype=torch.uint8)}
            rows = [row | shown | {"reference": torch.full((3, 1, 1), 9, dtype=torch.uint8)} for row in rows]
        self.held_out = rows


def test_inpainting_items_are_named_and_shown_beside_what_was_asked(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, callbacks=[ImageWriter(str(tmp_path), triptych=True)])
    media = torch.cat([batch["media"] for batch in trainer.predict(toy_method(), SignData(images=True))])
    rows = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"sign-{i}" for i in range(5)]
    for row, image in zip(rows, media, strict=True):
        shown = torch.from_numpy(np.array(Image.open(tmp_path / f"triptych-{row['file']}"))).permute(2, 0, 1)
        assert torch.equal(shown[:, :, -2:], image) and (shown[:, :, 6:8] == 9).all()


def test_a_triptych_of_prompts_without_images_is_refused_before_anything_is_painted(tmp_path: Path) -> None:
    writer = ImageWriter(str(tmp_path), triptych=True)
    with pytest.raises(ConfigError, match=r"images\.triptych .*lack \['source', 'mask', 'reference'\]"):
        toy_trainer(tmp_path, callbacks=[writer]).predict(toy_method(), SignData(images=False))
    assert not list(tmp_path.glob("*.png"))


def test_the_outline_lies_within_the_mask() -> None:
    """A mask of 4 x 3 pixels in 6 x 8: 10 are red, the 2 in its middle and all outside stay; the reference keeps its proportions."""
    mask = torch.zeros(6, 8, dtype=torch.uint8)
    mask[1:4, 2:6] = 255
    source, reference = torch.full((3, 6, 8), 50, dtype=torch.uint8), torch.full((3, 30, 10), 7, dtype=torch.uint8)
    sheet = triptych({"source": source, "mask": mask, "reference": reference}, torch.full((3, 6, 8), 99, dtype=torch.uint8), gap=1)
    shown = torch.from_numpy(np.array(sheet))
    assert shown.shape == (6, 3 * 8 + 2, 3)
    red = (shown == torch.tensor([255, 0, 0])).all(-1)
    assert red.nonzero().tolist() == [[y, x] for y in range(1, 4) for x in range(2, 6) if (y, x) not in ((2, 3), (2, 4))]
    assert (shown[:, :8][~red[:, :8]] == 50).all() and (shown[:, 18:] == 99).all() and (source == 50).all()
    assert (shown[:, 9:17] == 7).all(-1).sum(1).tolist() == [2] * 6


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
