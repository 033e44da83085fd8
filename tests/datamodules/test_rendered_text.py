"""The demo's task: numbers as pictures."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from datamodules.rendered_text import RenderedText, render_text


def test_held_out_numbers_are_never_trained_on_and_do_not_depend_on_the_seed() -> None:
    a, b = RenderedText(seed=0), RenderedText(seed=1)
    held_out = {row["text"] for row in a.held_out}
    assert len(held_out) == 20 and len(a.held_out) == 100 and len(a.train_prompts) == 80
    assert not held_out & {row["text"] for row in a.train_prompts}
    assert [r["text"] for r in a.held_out] == [r["text"] for r in b.held_out]
    shown = {row["text"] for step in range(20) for row in a.examples(step, 32)[0]}
    assert not held_out & shown


def test_examples_are_a_function_of_seed_and_step() -> None:
    (rows, images), (again, same) = (RenderedText(seed=3, defect_share=0.5).examples(7, 8) for _ in range(2))
    assert list(rows) == list(again) and torch.equal(images, same)
    assert not torch.equal(images, RenderedText(seed=4, defect_share=0.5).examples(7, 8)[1])
    assert images.dtype == torch.uint8 and images.shape == (8, 3, 16, 32)


@pytest.mark.parametrize("defect", ["lines", "misprint"])
def test_share_of_defects(defect: str) -> None:
    data = RenderedText(defect=defect, defect_share=0.4, jitter=0)
    rows, images = data.examples(0, 1000)
    right = sum(torch.equal(image, data.render(row["text"])) for row, image in zip(rows, images))
    assert right == pytest.approx(600, abs=50)


def test_lines_are_black_and_the_rest_is_as_it_was() -> None:
    data = RenderedText(defect_share=0.999999, jitter=0, line_start=1)
    rows, images = data.examples(0, 1)
    clean = data.render(rows[0]["text"])
    assert (images[0, :, 1::3] == 0).all() and torch.equal(images[0, :, ::3], clean[:, ::3])
    assert torch.equal(images[0, :, 2::3], clean[:, 2::3])


def test_ink_is_centred_and_jitter_moves_it() -> None:
    ink = (render_text("88", size=(16, 32), font_size=16)[0] < 128).nonzero().double()
    assert ink.mean(0).tolist() == pytest.approx([7.5, 15.5], abs=0.75)
    moved = (render_text("88", size=(16, 32), font_size=16, shift=3)[0] < 128).nonzero().double()
    assert (moved.mean(0) - ink.mean(0)).tolist() == pytest.approx([0, 3])


@pytest.mark.parametrize("settings", [dict(defect_share=1.0), dict(held_out_share=0.0), dict(template="a sign"), dict(line_start=3)])
def test_nonsense_is_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="data"):
        RenderedText(**settings)


@pytest.mark.parametrize("defect", ["lines", "misprint"])
def test_a_part_is_cut_from_the_same_examples(defect: Literal["lines", "misprint"]) -> None:
    data = RenderedText(seed=3, defect=defect, defect_share=0.5)
    (rows, images), (some, shown) = data.examples(7, 8), data.examples(7, 8, slice(3, 6))
    assert some == rows[3:6] and torch.equal(shown, images[3:6])
