"""Which text a prompt asks for, whatever quotes it is written in."""

import time

import pytest

from lit_rl.errors import ConfigError
from lit_rl.rewards.quotes import check_targets, find_target, quoted


@pytest.mark.parametrize(
    "quotes",
    [
        *(
            '"X"',
            "'X'",
            "“X”",
            "”X”",
            "“X“",
            "„X“",
            "„X”",
            "‟X”",
            "＂X＂",
            "❝X❞",
            "〝X〟",
            '"X”',
            '“X"',
            '„X"',
            "‘X’",
            "’X’",
            "‚X‘",
            "‘X'",
            "'X’",
        ),
        *(
            "«X»",
            "»X«",
            "»X»",
            "« X »",
            "«\u202fX\u202f»",
            "‹X›",
            "›X‹",
            "<<X>>",
            "「X」",
            "『X』",
            "｢X｣",
            "﹁X﹂",
            "﹃X﹄",
            "`X`",
            "`X'",
            "´X´",
        ),
        *('""X""', "''X''", "``X''", "``X``", "‘‘X’’", "““X””", ",,X''", ",,X“", '"""X"""', '\\"X\\"', '\\\\"X\\\\"', "\\'X\\'", "\\“X\\”"),
        *("&quot;X&quot;", "&ldquo;X&rdquo;", "&#39;X&#39;", "&laquo;X&raquo;", "&#8220;X&#x201d;", "″X″", "≪X≫", "\n“X”\n"),
    ],
)
@pytest.mark.parametrize("text", ["X", "OPEN 24/7", "Don't", "C'est l'été", "停", "Fish & Chips", "rock 'n' roll", "5-7"])
def test_every_kind_of_quotes(quotes: str, text: str) -> None:
    want = text
    for prompt in (f"a sign that says {quotes} on a wall", quotes, f"a dog's sign: {quotes}.", f"({quotes}), red", f"写着{quotes}的牌子"):
        assert quoted(prompt.replace("X", text)) == want, prompt


@pytest.mark.parametrize(
    ("prompt", "target"),
    [
        ('"STOP" over "GO"', "STOP"),
        ("„STOP“ über „GO“", "STOP"),
        ("‘STOP’ over ‘GO’", "STOP"),
        ("'A' and 'B'", "A"),
        ("«Arrêt» puis “Go”", "Arrêt"),
        ("“Arrêt” puis «Go»", "Arrêt"),
        ("写着「你好」和『再见』的海报", "你好"),
        ("'single' but \"double\"", "double"),
        ('empty "" then "X"', "X"),
        ("empty “” then ‘X’", "X"),
        ("empty ''", None),
        ('blank " \u200b"', None),
        ('“He said "hi" twice”', 'He said "hi" twice'),
        ('"He said “hi” twice"', "He said “hi” twice"),
        ("“He said ‘hi’ twice”", "He said ‘hi’ twice"),
        ("「A『B』C」", "A『B』C"),
        ("«A «B» C»", "A «B» C"),
        ("„A ‚B‘ C“", "A ‚B‘ C"),
        ('a board "say \\"hi\\" now" there', 'say "hi" now'),
        ('"A sign that says \\"STOP\\""', "STOP"),
        ('"A sign that says ""STOP"""', "STOP"),
        ("the text is 'don\\'t panic'", "don't panic"),
        ("‘don’t panic’ on a towel", "don’t panic"),
        ("a '90s sign 'COOL' in Dad's office", "COOL"),
        ('a 12" plate with "OPEN" on it', "OPEN"),
        ('12"x18" poster "SALE"', "SALE"),
        ("a 27” screen with “HELLO”", "HELLO"),
        ("a 6’2” man in a ”GO” shirt", "GO"),
        ("a 5″×7″ card with ″HI″", "HI"),
        ("”Room 101” and ”GO”", "Room 101"),
        ('Route 66"Diner"', "Diner"),
        ('"Room 101" and "GO"', "Room 101"),
        ("the dogs' bowl and the cats' bowl", None),
        ("it's the baker's", None),
        ("rock 'til dawn", None),
        ('never closed "STOP', None),
        ("a plain cat", None),
    ],
)
def test_which_of_several(prompt: str, target: str | None) -> None:
    assert quoted(prompt) == target


@pytest.mark.parametrize(
    ("given", "target"),
    [
        (42, "42"),
        (0, "0"),
        (3.5, "3.5"),
        ("007", "007"),
        ("", "X"),
        (None, "X"),
        (float("nan"), "X"),
        (float("inf"), "X"),
        ("\u200b", "X"),
        ("‘X’", "‘X’"),
        (True, "X"),
        (["A"], "X"),
    ],
)
def test_a_given_target_is_taken_as_written(given: object, target: str) -> None:
    assert find_target({"prompt": '"X"', "target": given}) == target
    assert find_target({"prompt": "a cat", "text": given}) == (target if target != "X" else None)


def test_rows_without_a_text_are_named_with_place_and_remedy() -> None:
    rows = [
        {"prompt": '"A"'},
        {"prompt": "a cat", "where": "train.txt:2"},
        {"prompt": '"B"', "target": ["B"], "id": "b-1"},
        {"prompt": "x"},
    ]
    with pytest.raises(ConfigError) as caught:
        check_targets(rows)
    message = str(caught.value)
    assert "3 prompts do not say which text" in message and '"target"' in message
    assert (
        "train.txt:2: 'a cat'" in message and "b-1: '\"B\"' with the target ['B'], which is no text" in message and "prompt: 'x'" in message
    )
    with pytest.raises(ConfigError, match=r"7 prompts.*\n(.*\n){5}.*and 2 more"):
        check_targets([{"prompt": "a cat"}] * 7)
    check_targets([{"prompt": "a cat", "target": 0}, {"prompt": "a cat", "text": "meow"}])


@pytest.mark.parametrize("piece", ['"', "''a ", "'a 'n' ", '\\"', "“", "«", '„"', "``a ", '“"', "‘a", '""a '])
def test_a_hostile_prompt_takes_no_time(piece: str) -> None:
    started = time.process_time()
    quoted(piece * (65_536 // len(piece)))
    assert time.process_time() - started < 20  # the square of its length would take minutes
