"""The OCR reward reads what PIL wrote, and its arithmetic."""

import math
import time
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import rapidocr
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from lit_rl.errors import ConfigError
from lit_rl.rewards.base import RewardError
from lit_rl.rewards.ocr import OCRReward, find_target, normalize, similarity, trim
from lit_rl.rewards.ocr_engine import reading_order

FONT = Path(matplotlib.__file__).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf"


def rendered(text: str, *, width: int, height: int, size: int) -> torch.Tensor:
    """Black text in the middle of a white canvas, uint8 "3 H W"."""
    image = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(image).text((width / 2, height / 2), text, font=ImageFont.truetype(str(FONT), size), fill="black", anchor="mm")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.fixture(scope="module")
def reward() -> OCRReward:
    reward = OCRReward()
    reward.setup()
    return reward


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


def scene(*texts: tuple[tuple[int, int], int, str], side: int = 512, ink: str = "black", paper: str | None = "white") -> torch.Tensor:
    """Signs on a wall that gets lighter upwards, uint8 "3 side side"; texts: place of the top left corner, size in pixels, text."""
    image = Image.linear_gradient("L").rotate(180).resize((side, side)).convert("RGB")
    draw = ImageDraw.Draw(image)
    draw.polygon([(side * 0.7, side * 0.25), (side * 0.8, side * 0.05), (side * 0.9, side * 0.25)], fill=(200, 40, 40))
    fonts = [ImageFont.truetype(str(FONT), size) for _, size, _ in texts]
    for (place, size, text), font in zip(texts, fonts):
        box = draw.textbbox(place, text, font=font)
        if paper:
            draw.rectangle((box[0] - size, box[1] - size // 2, box[2] + size, box[3] + size // 2), fill=paper)
    for (place, _, text), font in zip(texts, fonts):
        draw.text(place, text, font=font, fill=ink)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.mark.parametrize(
    ("media", "text"),
    [
        (scene(((90, 220), 44, "OPEN 24 HOURS")), "OPEN 24 HOURS"),
        (scene(((90, 300), 12, "Mind the gap")), "Mind the gap"),
        (scene(((90, 220), 44, "No Parking"), ink="white", paper="black"), "No Parking"),
        (scene(((90, 220), 44, "Hot Chili"), ink="#c00000", paper="#ffe000"), "Hot Chili"),
        (scene(((60, 30), 44, "Bare wall"), ink="#002060", paper=None), "Bare wall"),
        (scene(((90, 200), 40, "Grand"), ((90, 240), 40, "Opening"), ((90, 280), 40, "Today")), "Grand Opening Today"),
        (scene(((30, 220), 70, "one"), ((200, 220), 70, "TWO"), ((390, 240), 40, "three")), "one TWO three"),
        (scene(((200, 500), 60, "Wide Open"), side=768), "Wide Open"),
    ],
    ids=["sign", "small", "dark", "coloured", "wall", "lines", "row", "larger"],
)
def test_full_size_pictures_are_read_without_options(reward: OCRReward, media: torch.Tensor, text: str) -> None:
    scores, texts = reward.explain(media[None], [{"prompt": f'a street with a sign that reads "{text}"'}])
    assert scores["ocr_similarity"].item() == 1.0, texts


def test_slanted_lines_are_read_from_top_to_bottom(reward: OCRReward) -> None:
    flat = scene(((130, 200), 44, "FIRST"), ((310, 200), 44, "second"), ((130, 270), 44, "third"), ((310, 270), 44, "LAST"))
    image = Image.fromarray(flat.permute(1, 2, 0).numpy())
    for angle in (-12, 0, 12):
        turned = np.asarray(image.rotate(angle, fillcolor="white", resample=Image.Resampling.BICUBIC))
        assert normalize(reward.read([turned])[0][0], "exact") == "FIRST second third LAST"


@pytest.mark.parametrize("angle", [0.0, 0.3, -0.3])
def test_order_of_reading(angle: float) -> None:
    """Two rows of boxes of several heights; the lower corners of the first row are below the upper ones of the second where it slants."""
    corners = [(0, 0, 80, 20), (100, -12, 160, 26), (180, 3, 400, 18), (0, 34, 200, 50), (210, 30, 390, 52)]
    boxes = np.array([[(x, y), (u, y), (u, v), (x, v)] for x, y, u, v in corners], dtype=np.float32)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=np.float32)
    shuffled = [3, 1, 4, 0, 2]
    order = reading_order((boxes @ turn.T)[shuffled] + 500)
    assert [shuffled[i] for i in order] == [0, 1, 2, 3, 4]
    assert reading_order(boxes[:1]) == [0]


@pytest.mark.parametrize("shape", [(1, 1), (1, 3000), (3000, 1), (2, 400_000), (400_000, 2), (33, 6000)])
def test_no_shape_costs_more_than_a_large_picture(reward: OCRReward, shape: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    assert reward._line is not None and reward._scene is not None
    for read in (reward._line, reward._scene):
        started = time.process_time()
        text, confidence = read(noise)
        assert isinstance(text, str) and 0 <= confidence <= 1
        assert time.process_time() - started < 30


def test_a_long_banner_is_read_and_a_mask_may_hold_two_lines(reward: OCRReward) -> None:
    banner = rendered("a banner that is many times as long as it is high", width=1300, height=60, size=40)
    assert reward.read([banner.permute(1, 2, 0).numpy()])[0][0].replace(" ", "") == "abannerthatismanytimesaslongasitishigh"
    media, mask = (
        scene(((90, 200), 30, "Fresh Bread"), ((90, 240), 30, "and Coffee"), ((90, 400), 30, "CLOSED")),
        np.zeros((512, 512), np.uint8),
    )
    mask[190:290, 60:330] = 255
    scores, texts = reward.explain(media[None], [{"prompt": 'a shop "Fresh Bread and Coffee"', "mask": mask}])
    assert scores["ocr_similarity"].item() == 1.0, texts


def test_nothing_is_written_and_nothing_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    models = Path(rapidocr.__file__).parent / "models"
    before = sorted(models.iterdir())
    OCRReward().read([np.full((64, 64, 3), 255, np.uint8), np.full((16, 32, 3), 255, np.uint8)])
    assert sorted(models.iterdir()) == before and not list(tmp_path.iterdir()) and capfd.readouterr() == ("", "")


def test_detection_finds_two_lines_in_a_large_image() -> None:
    canvas = rendered("", width=256, height=256, size=10)
    canvas[:, 30:70, 20:220] = rendered("HELLO", width=200, height=40, size=30)
    canvas[:, 160:200, 20:220] = rendered("WORLD", width=200, height=40, size=30)
    scores, texts = OCRReward(detect=True, detect_side=256).explain(canvas[None], [{"prompt": 'a sign that says "hello world"'}])
    assert texts["ocr_text"] == ["HELLO WORLD"]
    assert scores["ocr_similarity"].item() == 1.0


def sign(inside: str, outside: str) -> tuple[torch.Tensor, np.ndarray]:
    """A wall uint8 "3 64 96" with `inside` in the masked part and `outside` in a larger script above it, and the mask."""
    canvas = torch.full((3, 64, 96), 180, dtype=torch.uint8)
    canvas[:, 2:26, 8:88] = rendered(outside, width=80, height=24, size=20)
    canvas[:, 40:56, 30:62] = rendered(inside, width=32, height=16, size=12)
    mask = np.zeros((64, 96), np.uint8)
    mask[40:56, 30:62] = 255
    return canvas, mask


@pytest.mark.parametrize("tensor", [True, False])
@pytest.mark.parametrize("detect", [True, False])
def test_only_the_masked_part_is_read(tensor: bool, detect: bool) -> None:
    """The right text elsewhere counts nothing, the wrong text elsewhere costs nothing."""
    canvases, masks = zip(sign("47", "812"), sign("812", "47"))
    info = [{"prompt": "a sign", "target": "47", "mask": torch.from_numpy(m) if tensor else m > 0} for m in masks]
    scores, texts = OCRReward(detect=detect, detect_side=256).explain(torch.stack(canvases), info)
    assert texts["ocr_text"] == ["47", "812"] and scores["ocr_similarity"].tolist() == [1.0, 0.0]


def test_what_stands_beside_a_slanted_mask_is_not_read(reward: OCRReward) -> None:
    """The mask is two steps of a stair; the wrong digits stand within its box but not on it."""
    canvas, mask = torch.full((3, 32, 64), 255, dtype=torch.uint8), np.zeros((32, 64), np.uint8)
    canvas[:, :16, :32], canvas[:, 16:, 32:] = (rendered(t, width=32, height=16, size=12) for t in ("88", "88"))
    canvas[:, 8:24, 16:48] = rendered("47", width=32, height=16, size=12)
    mask[8:24, 16:48] = mask[0, 48:] = mask[31, :16] = 255
    scores, texts = reward.explain(canvas[None], [{"prompt": '"47"', "mask": mask}])
    assert texts["ocr_text"] == ["47"] and scores["ocr_similarity"].item() == 1.0


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((16, 32), np.uint8), r"prompt 'cafe-01' is all zero; it must be above 0 where the text is"),
        (torch.ones(32, 16), r"prompt 'cafe-01' is \[32, 16\], its image \[16, 32\] \(height, width\)"),
        (torch.ones(1, 16, 32), r"is \[1, 16, 32\]"),
        ("mask.png", r"is str, its image"),
    ],
)
def test_a_mask_that_does_not_fit_stops_the_run(reward: OCRReward, mask: object, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        reward.score(torch.zeros(1, 3, 16, 32, dtype=torch.uint8), [{"prompt": '"47"', "id": "cafe-01", "mask": mask}])


def test_trim_reads_small_text_on_a_large_canvas() -> None:
    media = torch.stack([rendered(f"{i:02d}", width=128, height=64, size=30) for i in (0, 15, 45, 90)])
    info = [{"prompt": f'"{i:02d}"'} for i in (0, 15, 45, 90)]
    assert OCRReward(detect=False).score(media, info)["ocr_similarity"].tolist() == [1.0] * 4


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
        ({"prompt": "a cat", "text": "meow"}, "meow"),
        ({"prompt": "a cat", "text": "purr", "target": "meow"}, "meow"),
        ({"prompt": """The text is 'say "hi"'.""", "target": 'say "hi"'}, 'say "hi"'),
        ({"prompt": """The text is 'say "hi"'."""}, "hi"),
        ({"prompt": "The text is 'MOCHA'.", "target": None}, "MOCHA"),
        ({"prompt": "The text is 'MOCHA'.", "target": " "}, "MOCHA"),
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


def test_scripts_that_the_engine_has_no_letters_for_have_no_score(reward: OCRReward) -> None:
    """Not 0, which would be trained on; Latin with accents, Greek, Chinese and Japanese it reads."""
    known, unknown = ["Žižkov", "ΑΒΓ", "停车", "ひらがな", "ạ la carte", "42", "½"], ["Привет, 24!", "สวัสดี", "سلام", "안녕", "🙂"]
    reward.check({"prompt": "x", "target": text} for text in known)
    scores = reward.grade([("x", 1.0)] * 12, [{"prompt": "x", "target": text} for text in known + unknown])["ocr_similarity"]
    assert not scores[:7].isnan().any() and scores[7:].isnan().all()
    with pytest.raises(ConfigError, match=r"1 of 2 wanted texts.*script.*\n  a\.txt:1: 'Привет'"):
        reward.check([{"prompt": '"Привет"', "where": "a.txt:1"}, {"prompt": '"OK"'}])


def test_an_unknown_comparison_is_refused() -> None:
    with pytest.raises(ConfigError, match="compact"):
        OCRReward(compare="fuzzy")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"detect='yes'.*`auto`"):
        OCRReward(detect="yes")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="detect=1"):
        OCRReward(detect=1)  # type: ignore[arg-type]
