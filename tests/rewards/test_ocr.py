"""The OCR reward reads what PIL wrote, and its arithmetic."""

import math
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from lit_rl.rewards.ocr import OCRReward, find_target, normalize, similarity, trim

FONT = Path(matplotlib.__file__).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf"


def rendered(text: str, *, width: int, height: int, size: int) -> torch.Tensor:
    """Black text in the middle of a white canvas, uint8 "3 H W"."""
    image = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(image).text((width / 2, height / 2), text, font=ImageFont.truetype(str(FONT), size), fill="black", anchor="mm")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.fixture(scope="module")
def reward() -> OCRReward:
    return OCRReward()


def test_two_digits_on_32_by_16_pixels_are_read(reward: OCRReward) -> None:
    words = [f"{i:02d}" for i in range(7, 100, 9)]
    media = torch.stack([rendered(w, width=32, height=16, size=12) for w in words])
    scores, texts = reward.explain(media, [{"prompt": f'the number "{w}"'} for w in words])
    assert [normalize(t, "compact") for t in texts["ocr_text"]] == words
    assert scores["ocr_similarity"].tolist() == [1.0] * len(words)
    assert (scores["ocr_confidence"] > 0.5).all()


def test_score_does_not_depend_on_the_batch(reward: OCRReward) -> None:
    words = ["12", "Tea", "345", "MOCHA"]
    media = torch.stack([rendered(w, width=64, height=16, size=12) for w in words])
    info = [{"prompt": f"The text is '{w}'."} for w in words]
    together = reward.score(media, info)
    for order in ([3, 1, 0, 2], [2]):
        alone = reward.score(media[order], [info[i] for i in order])
        for name, values in alone.items():
            torch.testing.assert_close(values, together[name][order], rtol=0, atol=0)


def test_detection_finds_two_lines_in_a_large_image() -> None:
    canvas = rendered("", width=256, height=256, size=10)
    canvas[:, 30:70, 20:220] = rendered("HELLO", width=200, height=40, size=30)
    canvas[:, 160:200, 20:220] = rendered("WORLD", width=200, height=40, size=30)
    scores, texts = OCRReward(detect=True, detect_side=256).explain(canvas[None], [{"prompt": 'a sign that says "hello world"'}])
    assert texts["ocr_text"] == ["HELLO WORLD"]
    assert scores["ocr_similarity"].item() == 1.0


def test_a_mask_says_where_the_text_is(reward: OCRReward) -> None:
    canvas = torch.zeros(3, 64, 96, dtype=torch.uint8)
    canvas[:, 20:36, 30:62] = rendered("47", width=32, height=16, size=12)
    mask = np.zeros((64, 96), np.uint8)
    mask[20:36, 30:62] = 255
    assert reward.score(canvas[None], [{"prompt": '"47"', "mask": mask}])["ocr_similarity"].item() == 1.0


def test_trim_reads_small_text_on_a_large_canvas() -> None:
    media = torch.stack([rendered(f"{i:02d}", width=128, height=64, size=30) for i in (0, 15, 45, 90)])
    info = [{"prompt": f'"{i:02d}"'} for i in (0, 15, 45, 90)]
    assert OCRReward().score(media, info)["ocr_similarity"].tolist() == [1.0] * 4


def test_a_blank_image_is_zero_and_a_prompt_without_text_is_nan(reward: OCRReward) -> None:
    scores = reward.score(torch.full((2, 3, 16, 32), 255, dtype=torch.uint8), [{"prompt": '"42"'}, {"prompt": "a cat"}])
    assert scores["ocr_similarity"][0] == 0 and scores["ocr_similarity"][1].isnan()
    assert scores["ocr_confidence"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("info", "target"),
    [
        ({"prompt": 'a sign that says "Stop" and "Go"'}, "Stop"),
        ({"prompt": "a sign that says “Été”"}, "Été"),
        ({"prompt": "The text is 'don't panic'."}, "don't panic"),
        ({"prompt": "a dog's bowl 'REX'"}, "REX"),
        ({"prompt": "the dogs' bowl"}, None),
        ({"prompt": "a cat", "text": "meow", "target": "done.png"}, "meow"),
        ({"prompt": "a cat", "target": "meow"}, "meow"),
        ({"prompt": 'quotes "around" win', "text": "meow"}, "around"),
        ({"prompt": 'an empty ""'}, None),
        ({"prompt": 'blank "  "'}, None),
    ],
)
def test_target(info: dict[str, str], target: str | None) -> None:
    assert find_target(info) == target


@pytest.mark.parametrize(
    ("read", "target", "options", "value"),
    [
        ("kitten", "sitting", {}, 1 - 3 / 7),  # k->s, e->i, +g
        ("H E L L O", "hello", {}, 1.0),
        ("HELLO", "hello", {"how": "exact"}, 0.0),
        (" hello ", "hello", {"how": "exact"}, 1.0),
        ("a long sentence", "x", {}, 0.0),  # distance 13, never below 0
        ("well hello there", "hello", {"anywhere": True}, 1.0),
        ("well hello there", "hello", {}, 0.0),
        ("", "42", {}, 0.0),
    ],
)
def test_similarity(read: str, target: str, options: dict[str, object], value: float) -> None:
    assert math.isclose(similarity(read, target, **options), value)  # type: ignore[arg-type]


@given(st.text(min_size=0, max_size=20), st.text(min_size=1, max_size=20).filter(str.strip))
def test_similarity_is_in_the_unit_interval_and_one_only_for_equals(read: str, target: str) -> None:
    value = similarity(read, target)
    assert 0 <= value <= 1
    assert (value == 1) == (normalize(read, "compact") == normalize(target, "compact"))


def test_trim_keeps_the_ink_and_leaves_blank_images_alone() -> None:
    image = np.full((20, 30, 3), 200, np.uint8)
    assert trim(image).shape == (20, 30, 3)
    image[8:10, 12:17] = 0
    assert trim(image).shape == (2 + 4, 5 + 4, 3)
    image[0, 0] = 0
    assert trim(image).shape == (10 + 2, 17 + 2, 3)


def test_an_unknown_comparison_is_refused() -> None:
    with pytest.raises(ValueError, match="compact"):
        OCRReward(compare="fuzzy")  # type: ignore[arg-type]
