"""Characters that look the same in a picture count as equal, and no others do."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_rl.rewards.lettering import fold, is_visible, normalize, similarity

ALIKE = [
    ("A–B", "A-B"),
    ("A—B", "A-B"),
    ("A−B", "A-B"),
    ("A‐B", "A‑B"),
    ("Don’t", "Don't"),
    ("Donʼt", "Don`t"),
    ("“Hi”", '"Hi"'),
    ("''Hi''", "„Hi“"),
    ("5′ 3″", "5' 3\""),
    (unicodedata.normalize("NFD", "Été à Žižkov"), "Été à Žižkov"),
    ("ﬁre ﬂy oﬃce", "fire fly office"),
    ("Wait…", "Wait..."),
    ("10\u00a0km", "10 km"),
    ("10\u202fkm", "10 km"),
    ("A\u3000B", "A B"),
    ("two  spaces\nand lines", "two spaces and lines"),
    ("ＳＡＬＥ　５０％！", "SALE 50%!"),
    ("你好，世界！", "你好,世界!"),
    ("（一）", "(一)"),
    ("终。", "终."),
    ("甲、乙", "甲,乙"),
    ("時間：１０～１２", "時間:10~12"),
    ("ｶﾞﾗｽ", "ガラス"),
    ("co\u00adop", "coop"),
    ("a\u200bb\ufeff", "ab"),
    ("❤\ufe0f", "❤"),
    ("Å", "Å"),
    ("5 µm", "5 μm"),
    ("a・b", "a·b"),
    ("24⁄7", "24∕7"),
]
DISTINCT = [("O", "0"), ("l", "1"), ("I", "l"), ("é", "e"), ("½", "1/2"), ("①", "1"), ("x²", "x2"), ("™", "TM"), ("ß", "ss"), ("A", "a")]
DISTINCT += [("A_B", "A-B"), ("A.B", "A,B"), ("!", "|"), ("你", "妳"), ("«A»", '"A"'), ("A-B", "AB"), ("×", "x"), ("A B", "AB"), ("ı", "i")]


@pytest.mark.parametrize(("one", "other"), ALIKE)
def test_what_looks_alike_is_right(one: str, other: str) -> None:
    for read, target in ((one, other), (other, one), (one, one)):
        assert similarity(read, target) == similarity(read, target, how="exact") == 1.0


@pytest.mark.parametrize(("one", "other"), DISTINCT)
def test_what_looks_different_is_wrong_where_it_counts(one: str, other: str) -> None:
    assert similarity(one, other, how="exact") < 1.0 and similarity(other, one, how="exact") < 1.0


@given(st.text(max_size=30))
def test_folding_twice_changes_nothing(text: str) -> None:
    assert fold(fold(text)) == fold(text)
    for how in ("compact", "exact"):
        assert normalize(normalize(text, how), how) == normalize(text, how)


@pytest.mark.parametrize("text", ["", "  ", "\u200b", "\u00ad\ufeff", "\u3000", "\ufe0f"])
def test_nothing_to_see(text: str) -> None:
    assert not is_visible(text)
    assert similarity("", text) == 1.0 and similarity("x", text) == 0.0


def test_a_wrong_dash_costs_nothing_and_a_missing_one_its_share() -> None:
    assert similarity("A-B", "A–B", how="exact") == 1.0
    assert similarity("AB", "A–B") == pytest.approx(2 / 3)
