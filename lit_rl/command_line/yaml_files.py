"""The --config files as they are written: encoding, syntax, keys that stand twice, keys beside `class_path`."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from lit_rl.command_line.options import config_files, config_values

CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")


def missing_file(argv: Sequence[str]) -> str | None:
    """The sentence for the first --config that names no file. A mapping may stand in a file's place: `--config '{trainer: {...}}'`."""
    for value in config_values(argv):
        path = Path(value).expanduser()
        if value != "-" and not path.exists() and not any(sign in value for sign in "{[:\n"):
            near = difflib.get_close_matches(path.name, [file.name for file in path.parent.glob("*.yaml")], n=1)
            return f"--config {value}: there is no such file" + (f"; did you mean {path.parent / near[0]}?" if near else "")
    return None


def broken_yaml(argv: Sequence[str]) -> str | None:
    """The place and the fault of the first --config file that is no YAML or no mapping, or that sets a key twice."""
    return next((wrong for file in config_files(argv) if (wrong := fault(file))), None)


def fault(file: Path, holds: str = "a run has keys such as model, data and trainer") -> str | None:
    """The place and the fault of a file that is no YAML, no mapping, or sets a key twice. holds: what belongs into it."""
    try:
        root = yaml.compose(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        line = file.read_bytes()[: error.start].count(b"\n") + 1
        return f"{file}:{line}: this is not UTF-8 (byte {error.object[error.start]:#04x}): save the file in that encoding"
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{file}:{mark.line + 1}" if mark else str(file)
        began = f" ({error.context} that began in line {error.context_mark.line + 1})" if error.context and error.context_mark else ""
        return f"{where}: this is not YAML: {error.problem}{began}; indent with spaces, close what is open, put a space after each colon"
    except yaml.YAMLError as error:
        return f"{file}: this is not YAML: {' '.join(str(error).split())}"
    if not isinstance(root, yaml.MappingNode):
        found = "is empty" if root is None else "holds a list" if isinstance(root, yaml.SequenceNode) else "holds a single value"
        return f"{file}: {holds}; this file {found}"
    return next((f"{file}:{twice}" for node in _mappings(root) if (twice := _twice(node))), None)


def _twice(node: yaml.MappingNode) -> str | None:
    """YAML's readers take the last of two equal keys in silence."""
    lines: dict[str, int] = {}
    for key, _ in node.value:
        first = lines.setdefault(str(key.value), key.start_mark.line + 1)
        if key.value != "<<" and first != key.start_mark.line + 1:
            return (
                f"{key.start_mark.line + 1}: `{key.value}` stands a second time (first in line {first}), which would replace it: keep one"
            )
    return None


def beside_class(argv: Sequence[str]) -> str | None:
    """The sentence for options of a class that stand beside its `class_path`, or without one."""
    for file in config_files(argv):
        for node in _mappings(yaml.compose(file.read_text(encoding="utf-8"))):
            keys = {str(key.value): key.start_mark.line + 1 for key, _ in node.value}
            stray = next((key for key in keys if key not in CLASS_KEYS), None)
            if "class_path" in keys and stray is not None:
                return f"{file}:{keys[stray]}: `{stray}` stands beside class_path: options of a class stand under its init_args"
    return None


def _mappings(root: yaml.Node | None) -> Iterator[yaml.MappingNode]:
    """Every mapping of a file, outer ones first. An alias is visited where its anchor stands."""
    waiting, seen = [] if root is None else [root], set()
    while waiting:
        node = waiting.pop(0)
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            yield node
            waiting += [value for _, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value
