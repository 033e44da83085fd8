"""The demo's judge reads pictures, and answers as the rewards and the evaluation read it."""

import base64
import io

import pytest
from PIL import Image

from datamodules.rendered_text import render_text
from lit_rl.demo.judge import ReadingJudge
from lit_rl.evaluation.unigenbench import read_verdict
from lit_rl.rewards.judges.pairs import read_pair


@pytest.fixture(scope="module")
def judge() -> ReadingJudge:
    return ReadingJudge()


def shown(text: str) -> str:
    """A picture of a number as a data URL."""
    file = io.BytesIO()
    Image.fromarray(render_text(text, size=(16, 16), font_size=12).permute(1, 2, 0).numpy()).save(file, "png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def test_the_picture_that_reads_more_like_the_number_is_better_in_both_orders(judge: ReadingJudge) -> None:
    question = 'Compare these two images based on the prompt: a sign that says "47". Which image is better?'
    assert read_pair(judge.answer(question, [shown("47"), shown("92")])) == 1.0
    assert read_pair(judge.answer(question, [shown("92"), shown("47")])) == 0.0
    assert read_pair(judge.answer(question, [shown("47"), shown("47")])) == 0.5


def test_each_testpoint_is_fulfilled_where_the_number_is_read_exactly(judge: ReadingJudge) -> None:
    question = "Prompt: 「a sign that says \"47\"」\nTestpoints: ['Text Generation', 'Style']\n"
    for text, score in (("47", 1), ("48", 0)):
        found = read_verdict(judge.answer(question, [shown(text)]), ["Text Generation", "Style"])
        assert found is not None and found[0] == [score, score]
