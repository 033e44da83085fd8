"""The places of keys in the --config files of a run."""

from __future__ import annotations

from collections.abc import Sequence

from lit_rl.command_line.options import named_classes, settings, short


def at(key: str, sentence: str, argv: Sequence[str], *, value: str = "") -> str:
    """The sentence behind `file:line` of the key, if there is one such place."""
    place = where(key, argv, value=value)
    return f"{place}: {sentence}" if place else sentence


def where(key: str, argv: Sequence[str], *, value: str = "") -> str | None:
    """`file:line` of the only place in the run's YAML files that sets `key` (to `value`), that has `key` as its value, or that names a
    file which `key` begins with.

    `key` is a dotted path or its last part. None when an option sets it anew, and where there are several such places.
    """
    last = short(key).split(".")[-1]
    given = settings(argv)
    if any(not setting.place and (setting.path.split(".")[-1] == last or setting.value == key) for setting in given):
        return None
    tests = (
        lambda s: s.value == key,
        lambda s: s.path.endswith(short(key)) and s.path.split(".")[-1] == last and value in ("", s.value),
        lambda s: s.path.split(".")[-1] == last and value in ("", s.value),
        lambda s: len(s.value) > 3 and key.startswith(s.value),
    )
    for fits in tests:
        places = list(dict.fromkeys(setting.place for setting in given if fits(setting)))
        if len(places) == 1:
            return places[0]
    return None


def names_no_class(path: str, argv: Sequence[str]) -> bool:
    """A mapping without `class_path` stands under the key."""
    classes = {short(name) for name in named_classes(argv)}
    return path not in classes and any(setting.path.startswith(f"{path}.") for setting in settings(argv))
