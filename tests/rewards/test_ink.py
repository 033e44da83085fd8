"""The colour of the ink, by hand."""

import math

import numpy as np
import pytest
import torch

from lit_rl.rewards.ink import InkReward, ink_colour

RED, BLUE, PAPER = (200, 0, 0), (0, 0, 200), (240, 240, 230)


def picture(ink: tuple[int, int, int], *, paper: tuple[int, int, int] = PAPER, rows: slice = slice(2, 4)) -> torch.Tensor:
    """uint8 "3 8 8": a bar of ink on paper."""
    image = torch.tensor(paper, dtype=torch.uint8).view(3, 1, 1).repeat(1, 8, 8)
    image[:, rows, 1:7] = torch.tensor(ink, dtype=torch.uint8).view(3, 1, 1)
    return image


def score(image: torch.Tensor, reference: torch.Tensor, **info: object) -> float:
    return float(InkReward().score(image[None], [{"prompt": "p", "reference": reference, **info}])["ink_similarity"][0])


def test_ink_is_what_differs_most_from_the_paper() -> None:
    """The paper is 255 (median), the ink 0, an edge between them 200: only the ink is at least 128 away from the paper."""
    pixels = np.repeat(np.array([[255], [200], [0]], dtype=np.uint8), [10, 4, 3], axis=0).repeat(3, axis=1)
    assert ink_colour(pixels).tolist() == [0, 0, 0]  # type: ignore[union-attr]
    assert ink_colour(np.full((9, 3), 255, dtype=np.uint8)) is None


@pytest.mark.parametrize(("ink", "expected"), [(RED, 1.0), ((100, 0, 0), 1 - 100 / 255), ((140, 80, 0), 1 - 100 / 255), (BLUE, 0.0)])
def test_similarity_falls_with_the_distance_of_the_colours(ink: tuple[int, int, int], expected: float) -> None:
    """|(140, 80, 0) - (200, 0, 0)| = |(-60, 80)| = 100; red and blue are 283 apart, which is more than 255. Paper and size do not count."""
    assert score(picture(ink), picture(RED, paper=(255, 255, 255))[:, :7]) == pytest.approx(expected, abs=1e-6)


def test_only_what_the_mask_shows_counts() -> None:
    image = picture(RED)
    image[:, 5:] = torch.tensor(BLUE, dtype=torch.uint8).view(3, 1, 1)
    mask = torch.zeros(8, 8, dtype=torch.uint8)
    mask[1:5] = 255
    assert score(image, picture(RED), mask=mask) == 1.0
    assert score(image, picture(RED), mask=255 - mask) < 1.0


def test_without_ink() -> None:
    blank = picture(PAPER)
    assert score(blank, picture(RED)) == 0.0
    assert math.isnan(score(picture(RED), blank))
