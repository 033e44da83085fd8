"""Options of a run from the environment (`lit_rl.net.environment.VARIABLES`), and what is said about where they come from."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

from jsonargparse import Namespace

from lit_rl.command_line.dotted import imported_class
from lit_rl.command_line.options import short
from lit_rl.errors import ConfigError
from lit_rl.net.env_file import place_of
from lit_rl.net.environment import VARIABLES, Variable, redacted


class Place(NamedTuple):
    """An option of a run that a variable of the environment may give its value."""

    variable: Variable
    holder: Namespace | dict[str, object]
    key: str
    path: str
    """The path that people say: `model.policy.checkpoint`."""

    @property
    def value(self) -> object:
        """The option's value now; of a judge, its address."""
        value = self.holder.get(self.key)
        return value.get("urls") if self.variable.itself and isinstance(value, Namespace) else value

    @property
    def text(self) -> str:
        """The variable's; "" where it is not set."""
        return os.environ.get(self.variable.name, "").strip()

    @property
    def counts(self) -> bool:
        """Another option of the class is as the variable wants it."""
        if self.variable.having is None:
            return True
        name, wanted = self.variable.having
        return self.holder.get(name) == wanted

    @property
    def told(self) -> object:
        """The variable's as the option takes it. Raises ConfigError that names both."""
        try:
            return self.variable.convert(self.text)
        except ValueError as error:
            raise ConfigError(
                f"{self.variable.name}={self.text} in {place_of(self.variable.name)} must be {error} ({self.path}): correct it or unset it"
            ) from error


def fill_in(options: Namespace) -> Namespace:
    """Give the options of a subcommand that nobody has set the values that the environment has for them. Changes `options`."""
    for place in places(options):
        if place.text and place.value in (None, place.variable.unset) and not place.variable.itself:
            place.holder[place.key] = place.told
    return options


def expand_home(values: object) -> object:
    """A parsed configuration in which every text that begins with `~/` is a path in the home folder. Changes it in place."""
    if isinstance(values, str):
        return os.path.expanduser(values) if values == "~" or values.startswith("~/") else values
    if isinstance(values, Namespace | dict):
        keys = vars(values) if isinstance(values, Namespace) else values
        keys.update({key: expand_home(value) for key, value in keys.items()})
    elif isinstance(values, list):
        values[:] = map(expand_home, values)
    return values


def sources(options: Namespace) -> Iterator[str]:
    """A line for each variable that is set and belongs to an option of the run: whether its value is the one that counts."""
    for place in places(options):
        name, where = place.variable.name, place_of(place.variable.name)
        if place.text and (place.value == place.told or (place.variable.itself and place.value is None)):
            yield f"{place.path} = {redacted(place.text)}: from {name} in {where}"
        elif place.text:
            yield f"{place.path} = {redacted(str(place.value))}: from the run itself, before {name} in {where}"


def places(options: Namespace) -> Iterator[Place]:
    """Every option of the run that has a variable, in the order of the run's keys."""
    lineages = [(path, spec, _lineage(str(spec.get("class_path")))) for path, spec in _classes(options, "")]
    named = {name for _, _, lineage in lineages for name in lineage}
    for variable in VARIABLES:
        above, _, key = variable.option.rpartition(".")
        if variable.owner is None and variable.within in (None, *named) and isinstance(holder := options.get(above), Namespace):
            yield Place(variable, holder, key, variable.option)
        for path, spec, lineage in lineages:
            fits = variable.owner in lineage and variable.within in (None, *named)
            if fits and isinstance(arguments := spec.get("init_args"), Namespace | dict):
                place = Place(variable, arguments, key, short(f"{path}.{key}"))
                yield from [place] if place.counts else []


def _classes(node: object, path: str) -> Iterator[tuple[str, Namespace | dict[str, object]]]:
    """Path and mapping of each class that the options name, however deep."""
    if isinstance(node, Namespace | dict):
        inner = vars(node) if isinstance(node, Namespace) else node
        if isinstance(inner.get("class_path"), str):
            yield path, node
        for key, value in inner.items():
            yield from _classes(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from _classes(value, f"{path}.{i}")


def _lineage(class_path: str) -> list[str]:
    """Dotted paths of a class and those that it derives from."""
    cls = imported_class(class_path)
    return [] if cls is None else [f"{base.__module__}.{base.__qualname__}" for base in cls.__mro__]
