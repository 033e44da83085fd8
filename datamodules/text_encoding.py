"""Text files as text: UTF-8, or what their byte order mark says."""

from __future__ import annotations

import codecs
import json
from pathlib import Path

from lit_rl.errors import ConfigError

MARKS = [
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, with whose mark it begins
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
]

DECODER = json.JSONDecoder()


def read_text(path: Path) -> str:
    """The text of a file, each line ended by "\\n". Raises ConfigError with line and remedy for one in another encoding."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from error
    mark, encoding = next(((mark, name) for mark, name in MARKS if data.startswith(mark)), (b"", "utf-8"))
    data = data[len(mark) :]
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        known = data[: error.start].decode(encoding, "replace")
        raise ConfigError(
            f"{path}:{known.count(chr(10)) + 1}: byte 0x{data[error.start]:02x} is not {encoding.upper()}; convert the file, e.g. from the "
            f"encoding of Windows in Western Europe: iconv -f cp1252 -t utf-8 {path.name} > new{path.suffix}"
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        hint = ": it looks like UTF-16 without a byte order mark; convert the file, e.g. iconv -f utf-16le -t utf-8" if not mark else ""
        raise ConfigError(f"{path}:{line}: a NUL byte is no text{hint}")
    lines = text.replace("\r\n", "\n").replace("\r", "\n")
    return lines.replace("\n\ufeff", "\n")  # files with a mark that were put together


def parse_json(text: str) -> object:
    """The value that a text says. Raises json.JSONDecodeError, too for what Python itself refuses to read and for letters that are none."""
    try:
        value, end = DECODER.raw_decode(text)  # half of what `json.loads` takes, but without white space around the value
    except (ValueError, RecursionError):
        end = -1
    if end != len(text):
        value = _loads(text)
    if "\\u" in text and (at := text.lower().find("\\ud")) >= 0:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            raise json.JSONDecodeError(f"{half} is half of a character; write both halves, or take it out", text, at) from error
    return value


def _loads(text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError) as error:  # thousands of digits or of brackets
        raise json.JSONDecodeError(str(error), text, 0) from error
