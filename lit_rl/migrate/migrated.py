"""The result of reading another system's file, and its YAML."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import yaml

from lit_rl.errors import ConfigError
from lit_rl.migrate.values import Keys


@dataclass
class Migrated:
    """A file's content in this project's words.

    settings: value by dotted key of a run's YAML. bases: configs that it is laid over, the nearest last. notes: sentences for the reader.
    """

    settings: dict[str, object] = field(default_factory=dict)
    bases: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def take(self, keys: Keys, given: Mapping[str, object], *, told: Callable[[str], str]) -> None:
        """Add the settings of each given value by its key in `keys`; other keys are passed over.

        told: Begins the sentence about a key's value. Raises ConfigError for a value that its key cannot have.
        """
        for key, value in given.items():
            if key in keys:
                try:
                    self.settings |= keys[key](value)
                except ValueError as error:
                    raise ConfigError(f"{told(key)}: it must be {error}") from error

    def note(self, reasons: Mapping[str, str], given: Iterable[str]) -> None:
        """Add a note for each given key that has a reason."""
        self.notes += [f"{key}: {reasons[key]}" for key in given if key in reasons]

    def yaml(self, source: str) -> str:
        """The YAML, with the command that runs it and the notes in front."""
        command = "".join(f" --config {base}" for base in self.bases)
        lines = [
            f"Made of {source} by python -m lit_rl.migrate. Save it as run.yaml, then:",
            f"python cli.py fit{command} --config run.yaml",
        ]
        head = "".join(f"# {line}\n" for line in (*lines, *self.notes))
        return head + yaml.safe_dump(self.nested(), sort_keys=False, allow_unicode=True, default_flow_style=None, width=140)

    def nested(self) -> dict[str, object]:
        """The settings as mappings in mappings."""
        found: dict[str, object] = {}
        for path, value in self.settings.items():
            node = found
            *above, key = path.split(".")
            for name in above:
                inner = node.setdefault(name, {})
                assert isinstance(inner, dict), f"{path} stands below a value"
                node = inner
            there = node.get(key)
            node[key] = {**value, **there} if isinstance(value, Mapping) and isinstance(there, dict) else _own(value)
        return found


def _own(value: object) -> object:
    """A mapping of its own, to which further keys may be added."""
    return dict(value) if isinstance(value, Mapping) else value


def unknown(kind: str, name: str, known: Iterable[str], *, place: str) -> ConfigError:
    """The sentence about a name that the other system does not have either, with the nearest one that it has."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(names[:40])}"
    return ConfigError(f"{place}: {kind} {name} is unknown; {meant}")
