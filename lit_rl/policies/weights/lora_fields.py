"""Fields of PEFT's configuration of an adapter, in a folder's adapter_config.json or the header of a pipeline's file."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial

from lit_rl.errors import ConfigError


def _number(value: object, kind: type | tuple[type, ...] = (int, float)) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _numbers(value: object, kind: type | tuple[type, ...] = (int, float)) -> bool:
    return value is None or (isinstance(value, dict) and all(_number(v, kind) for v in value.values()))


def _names(value: object) -> bool:
    if not isinstance(value, str):
        return value is None or (isinstance(value, list) and all(isinstance(v, str) for v in value))
    try:
        re.compile(value)
    except re.error:
        return False
    return True


READABLE: dict[str, tuple[Callable[[object], bool], str]] = {
    "r": (lambda value: isinstance(value, int) and not isinstance(value, bool) and value > 0, "a whole number above 0"),
    "lora_alpha": (lambda value: _number(value) and value != 0, "a number other than 0, with which the adapter would do nothing"),
    "rank_pattern": (partial(_numbers, kind=int), "ranks by name"),
    "alpha_pattern": (_numbers, "numbers by name"),
    "target_modules": (_names, "names of modules, or a regular expression of them"),
    "exclude_modules": (_names, "names of modules, or a regular expression of them"),
    "target_parameters": (_names, "names of parameters"),
}
"""Fields of PEFT's configuration that it computes with without looking at them: what they may be."""


def check_readable(fields: Mapping[str, object], *, where: str) -> None:
    """Raise ConfigError for a field that PEFT cannot compute with, or that leaves the adapter without effect."""
    for field, (right, expected) in READABLE.items():
        if field in fields and not right(fields[field]):
            raise ConfigError(
                f"lora.initial: {field} of {where} is {fields[field]!r}, expected {expected}: write there what the adapter was trained with"
            )
