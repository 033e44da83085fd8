"""A YAML file with the line of each of its keys, for errors that say where something stands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from lit_rl.errors import ConfigError

Path_ = tuple[str | int, ...]


@dataclass(frozen=True)
class Document:
    """The content of a file, and the line of each value by its path of keys and numbers."""

    file: Path
    content: object
    lines: Mapping[Path_, int]

    def where(self, *path: str | int) -> str:
        """`file:line` of a value, or of what holds it where it is missing."""
        known = next((path[:n] for n in range(len(path), -1, -1) if path[:n] in self.lines), ())
        return f"{self.file}:{self.lines.get(known, 1)}"


def read_document(file: Path) -> Document:
    """Read a YAML file. Raises ConfigError with file and line for one that is missing, not YAML, or sets a key twice."""
    try:
        root = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        line = file.read_bytes()[: error.start].count(b"\n") + 1
        raise ConfigError(f"{file}:{line}: this is not UTF-8: save the file in that encoding") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{file}:{mark.line + 1}" if mark else str(file)
        raise ConfigError(f"{where}: this is not YAML: {getattr(error, 'problem', None) or error}") from error
    lines: dict[Path_, int] = {}
    content = _content(root, (), lines, file)
    return Document(file, content, lines)


def _content(node: yaml.Node | None, path: Path_, lines: dict[Path_, int], file: Path) -> object:
    if node is None:
        return None
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        return [_content(item, (*path, i), lines, file) for i, item in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        found: dict[str, object] = {}
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in found:
                raise ConfigError(f"{file}:{line}: `{name}` stands a second time (first in line {lines[*path, name]}): keep one")
            lines[*path, name] = line
            found[name] = _content(value, (*path, name), lines, file)
        return found
    return yaml.SafeLoader("").construct_object(node)
