"""The options that a rollout was made with, and those of the run that continues it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, is_dataclass

from lit_rl.errors import ConfigError

PLAIN = (str, int, float, bool, type(None))

REMEDY = "or from a checkpoint of the end of an epoch, after which everything may change"


def options_of(part: object, prefix: str) -> dict[str, object]:
    """Value by dotted name of the options in `stored_with` of the class of `part` and its bases, in types that any file can hold."""
    names = [name for cls in type(part).__mro__ for name in vars(cls).get("stored_with", ())]
    return {key: value for name in dict.fromkeys(names) for key, value in _flat(f"{prefix}.{name}", getattr(part, name))}


def check_options(stored: Mapping[str, object], now: Mapping[str, object]) -> None:
    """Raise ConfigError that names the first option with another value than the rollout in a checkpoint was made with.

    Options that one of the two lacks are left alone: releases differ in what they have.
    """
    for name in [name for name in stored if name in now and stored[name] != now[name]]:
        raise ConfigError(
            f"{name}={now[name]}, and the checkpoint was written inside an iteration, whose rollout was made with {stored[name]}: continue "
            f"with {name}={stored[name]}, {REMEDY}"
        )


def _flat(name: str, value: object) -> Iterator[tuple[str, object]]:
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{name}.{key}", inner)
    elif isinstance(value, list | tuple):
        yield name, [item if isinstance(item, PLAIN) else str(item) for item in value]
    else:
        yield name, value if isinstance(value, PLAIN) else str(value).removeprefix("torch.")
