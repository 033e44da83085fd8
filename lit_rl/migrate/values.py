"""Converters of another system's values: each returns the value here, or raises ValueError that says what the value must be.

A table of keys has for each key a function of its value that returns settings of a run (`Keys`); `Migrated.take` applies one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

Settings = dict[str, object]
"""Values by dotted key of a run's YAML."""
Convert = Callable[[object], object]
Keys = Mapping[str, Callable[[object], Settings]]
"""A function of the value by key of the other system."""


def number(value: object) -> float | int:
    """The value as a number; a text may hold one, for YAML reads 1e-5 as a text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("a number")
    if isinstance(value, int | float):
        return value
    try:
        return int(value) if re.fullmatch(r"[+-]?\d+", value) else float(value)
    except ValueError as error:
        raise ValueError("a number") from error


def real(value: object) -> float:
    """The value as a number with a decimal point."""
    return float(number(value))


def whole(value: object) -> int:
    """The value as a whole number of any sign."""
    try:
        found = number(value)
    except ValueError as error:
        raise ValueError("a whole number") from error
    if not isinstance(found, int):
        raise ValueError("a whole number")
    return found


def count(value: object) -> int:
    """The value as a positive whole number."""
    try:
        found = whole(value)
    except ValueError as error:
        raise ValueError("a positive whole number") from error
    if found < 1:
        raise ValueError("a positive whole number")
    return found


def switch(value: object) -> bool:
    """The value as true or false."""
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def text(value: object) -> str:
    """The value as a text."""
    if not isinstance(value, str) or not value:
        raise ValueError("a text")
    return value


def names(value: object) -> list[str]:
    """The value as a list of texts."""
    if not isinstance(value, list) or not value or not all(isinstance(name, str) for name in value):
        raise ValueError("a list of texts")
    return list(value)


def words(value: object) -> str | list[str]:
    """The value as a text, or as a list of texts."""
    try:
        return names(value) if isinstance(value, list) else text(value)
    except ValueError as error:
        raise ValueError("a text, or a list of texts") from error


def one_of(values: Mapping[str, object] | tuple[str, ...]) -> Convert:
    """A converter of one of a few words, to the value that a mapping has for it, or to itself."""

    def convert(value: object) -> object:
        if not isinstance(value, str) or value not in values:
            raise ValueError(f"one of {', '.join(values)}")
        return values[value] if isinstance(values, Mapping) else value

    return convert


def same(key: str, convert: Convert = number) -> Callable[[object], Settings]:
    """One key of theirs is one key here."""
    return lambda value: {key: convert(value)}


def checked(convert: Convert) -> Callable[[object], Settings]:
    """The key is decided together with others: its value is checked, and becomes no setting by itself."""

    def made(value: object) -> Settings:
        convert(value)
        return {}

    return made


def only(wanted: object, why: str) -> Callable[[object], Settings]:
    """The key has a single value that can be had, which is no setting here."""

    def made(value: object) -> Settings:
        if value != wanted:
            raise ValueError(f"{'true' if wanted is True else 'false' if wanted is False else wanted}: {why}")
        return {}

    return made
