"""Files of text as editors of other systems write them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from datamodules.inpainting_files import read_rows
from datamodules.prompts import read_prompts
from datamodules.prompts_text import TextPrompts
from datamodules.text_encoding import read_text
from lit_rl.errors import ConfigError

TEXT = "Größe 5€ “x”\nseparator \u2028 here\n\nlast 日本"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_the_byte_order_mark_says_the_encoding(tmp_path: Path, encoding: str, end: str) -> None:
    mark = "\ufeff" if encoding.endswith(("le", "be")) else ""
    (tmp_path / "x.txt").write_bytes((mark + TEXT.replace("\n", end)).encode(encoding))
    assert read_text(tmp_path / "x.txt") == TEXT


READERS: dict[str, Callable[[Path], Any]] = {
    "prompts.txt": lambda path: [row["prompt"] for row in read_prompts(path)],
    "prompts.jsonl": lambda path: [row["prompt"] for row in read_prompts(path)],
    "texts.jsonl": lambda path: [row["prompt"] for row in TextPrompts(train=str(path)).train_prompts],
    "texts.json": lambda path: [row["prompt"] for row in TextPrompts(train=str(path)).train_prompts],
    "items.jsonl": lambda path: [row.fields["prompt"] for row in read_rows(path)[0]],
    "items.json": lambda path: [row.fields["prompt"] for row in read_rows(path)[0]],
    "self_bench.txt": lambda path: [row.fields["text"] for row in read_rows(path.parent)[0]],
}


def content(name: str) -> str:
    if name == "self_bench.txt":
        return "1-a\r\n\r\n2-Größe\r\n"
    if name.endswith(".txt"):
        return "a\r\n\r\nGröße\r\n"
    rows = [json.dumps({"prompt": text}, ensure_ascii=False) for text in ("a", "Größe")]
    return "[" + ",\r\n".join(rows) + "]" if name.endswith("json") else "\r\n\r\n".join(rows) + "\r\n"


@pytest.mark.parametrize("name", READERS)
def test_every_reader_of_text(tmp_path: Path, name: str) -> None:
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        (tmp_path / name).write_bytes(content(name).encode(encoding))
        assert READERS[name](tmp_path / name) == ["a", "Größe"], encoding
    line = content(name).split("Größe")[0].count("\n") + 1
    for data, why in {
        content(name).encode("cp1252"): rf"{name}:{line}: byte 0xf6 is not UTF-8; convert the file, .*iconv -f cp1252 -t utf-8 {name}",
        content(name).encode("utf-16-le"): rf"{name}:1: .* iconv -f utf-16le -t utf-8|{name}:{line}: byte 0xf6",
        content(name).replace("Gr", "G\0r").encode(): rf"{name}:{line}: a NUL byte is no text",
        b"\xff\xfe" + content(name).encode("utf-16-le")[:-1]: "is not UTF-16-LE",
    }.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ConfigError, match=why):
            READERS[name](tmp_path / name)


@pytest.mark.parametrize("name", [name for name in READERS if not name.endswith(".txt")])
@pytest.mark.parametrize(
    ("value", "why"), [('"a \\ud83d"', r"\\ud83d is half of a character"), ("9" * 5000, "4300 digits"), ("[" * 100_000, "recursion")]
)
def test_json_that_cannot_be_used_is_named_by_line(tmp_path: Path, name: str, value: str, why: str) -> None:
    (tmp_path / name).write_text(content(name).replace('"Größe"', value), encoding="utf-8")
    line = r"\d" if name.endswith("json") else "3"
    with pytest.raises(ConfigError, match=rf"{name}:{line}: not JSON .*{why}"):
        READERS[name](tmp_path / name)
    (tmp_path / name).write_text(content(name).replace("Größe", "\\ud83d\\ude00"), encoding="utf-8")
    assert READERS[name](tmp_path / name) == ["a", "😀"]


def test_files_with_a_mark_that_were_put_together(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("\ufeffa\n\ufeffb \ufeff\n", encoding="utf-8")
    assert read_text(tmp_path / "x.txt") == "a\nb \ufeff\n"


def test_a_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "prompts.txt").write_text("a\n")
    assert read_prompts(Path("~/prompts.txt"))[0]["prompt"] == "a"
