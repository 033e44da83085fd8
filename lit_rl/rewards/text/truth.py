"""The texts that a row's ground truth stands for: files and tables hold it as a text, a number, a list, or a scalar of some library."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from decimal import Decimal
from fractions import Fraction

import numpy as np

from lit_rl.errors import ConfigError

NUMBER = re.compile(r"[-+]?(?:\d+|\d{1,3}(?:,\d{3})+)?(?:\.\d*)?")
"""72, -3,371.50, .5, 18.: a comma only between thousands, for 1,2 may be two numbers."""
EXPONENT = re.compile(r"([-+]?\d+(?:\.\d*)?)[eE]([-+]?\d{1,3})")
WRAPPERS = [re.compile(p, re.DOTALL) for p in (r"\$+(.*?)\$+", r"\\\((.*)\\\)", r"\\\[(.*)\\\]", r"\\boxed\{(.*)\}", r"\\boxed (.*)")]
DROPPED = [("\\$", ""), ("$", ""), ("\\%", ""), ("%", ""), ("{,}", ","), ("\\,", ""), ("\\!", ""), ("^\\circ", ""), ("^{\\circ}", "")]
"""Signs beside a number that rules do not read: currency, percent, degrees, thin spaces of LaTeX."""


def accepted_texts(value: object) -> tuple[str, ...]:
    """The texts of which an answer must give one: the truth as it stands, then without LaTeX around it, and a number as rules read it.

    72.0 gives 72.0 and 72; "1,234" gives 1,234 and 1234; "$72$" gives 72 too; "50\\%" gives 50 too; a whole answer of GSM8K what stands
    behind "####"; a list gives those of its items. Raises ConfigError for what no answer can equal: None, NaN, an object, an empty text
    or list.
    """
    return tuple(dict.fromkeys(form for text in _texts(value, value) for form in _forms(text)))


def is_number(value: object) -> bool:
    """True for a ground truth that is a number, with which an answer is compared as a number; False for a text that holds one."""
    value = _plain(value)
    return isinstance(value, int | float | Decimal) and not isinstance(value, bool)


def _texts(value: object, whole: object) -> list[str]:
    """A value, or each item of a list, as text."""
    value = _plain(value)
    if isinstance(value, bool):
        return [str(value), str(value).lower()]
    if isinstance(value, int):
        return [str(value)]
    if isinstance(value, float | Decimal | Fraction) and math.isfinite(value):
        return _of_number(value)
    if isinstance(value, str) and value.strip() and value.strip().lower() != "nan":
        return [value, *_of_json(value)]
    items = list(value) if isinstance(value, Iterable) and not isinstance(value, str | Mapping) else []
    if items and not any(isinstance(item, list | tuple | Mapping) for item in items):
        return [text for item in items for text in _texts(item, whole)]
    raise ConfigError(f"a text or number, found {whole!r}; a list may hold several accepted answers")


def _plain(value: object) -> object:
    """A value of numpy, torch, pyarrow or pandas as one of Python."""
    if isinstance(value, np.floating):
        return Decimal(str(value)) if np.isfinite(value) else math.nan  # float() would write out the digits that a float32 does not have
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if hasattr(value, "as_py"):
        return value.as_py()
    if isinstance(value, np.generic | np.ndarray) or type(value).__module__.partition(".")[0] in ("torch", "pandas"):
        return value.tolist() if hasattr(value, "tolist") else value
    return value


def _of_number(value: float | Decimal | Fraction) -> list[str]:
    if isinstance(value, Fraction):
        return [str(value), f"\\frac{{{value.numerator}}}{{{value.denominator}}}"] if value.denominator > 1 else [str(value)]
    texts = [str(value)]
    if isinstance(value, float) and float(short := np.float32(value)) == value:
        texts.append(str(short))  # 0.1 that went through a float32 column is 0.10000000149011612
    return texts


def _of_json(text: str) -> list[str]:
    """The items of a list of strings that was written into a text column: ["34"]."""
    if not text.strip().startswith('["'):
        return []
    try:
        items = json.loads(text)
    except ValueError:
        return []
    return [item for item in items if isinstance(item, str) and item.strip()]


def _forms(text: str) -> list[str]:
    forms = [text]
    bare = text.rpartition("####")[2].strip() or text.strip()
    while (inner := next((m[1].strip() for w in WRAPPERS if (m := w.fullmatch(bare))), None)) and "$" not in inner:
        forms.append(bare := inner)
    plain = bare
    for old, new in DROPPED:
        plain = plain.replace(old, new)
    return [*forms, bare, *_written_plainly(plain.strip())]


def _written_plainly(text: str) -> list[str]:
    """A number without commas, exponent, plus, and zeros that say nothing; nothing for other texts."""
    if exponent := EXPONENT.fullmatch(text):
        number = Decimal(exponent[1]).scaleb(int(exponent[2]))
    elif NUMBER.fullmatch(text) and any(letter.isdecimal() for letter in text):
        number = Decimal(text.replace(",", ""))
    else:
        return []
    as_written = text.removeprefix("+").removesuffix(".").replace(",", "")
    shortest = format(number if number else abs(number), "f")
    shortest = shortest.rstrip("0").rstrip(".") if "." in shortest else shortest
    return [as_written, shortest] if not exponent else [shortest]
