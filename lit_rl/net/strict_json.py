"""JSON as it is defined: no key twice, no NaN, nothing nested without end."""

from __future__ import annotations

import json
from collections.abc import Mapping


def parse_json(text: bytes | str, *, numbers: bool = True) -> object:
    """The value of a JSON text. Raises ValueError with at most 120 characters.

    numbers: Take `NaN` and `Infinity`, which Python writes and JSON does not have.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=None if numbers else _refused)
    except (ValueError, RecursionError) as error:
        raise ValueError(str(error)[:120]) from error


def _unique(pairs: list[tuple[str, object]]) -> Mapping[str, object]:
    if len(keys := dict(pairs)) != len(pairs):
        raise ValueError("a key appears twice")
    return keys


def _refused(name: str) -> object:
    raise ValueError(f"{name} is no number of JSON")
