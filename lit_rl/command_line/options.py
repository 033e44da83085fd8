"""The settings of a run as its files and command line write them, and the options of every class that the run names."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import typing
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import yaml

from lit_rl.command_line.dotted import imported, imported_class


class Setting(NamedTuple):
    """One key of a YAML file, or one `--key value` of the command line."""

    path: str
    """Dotted path without `init_args` and positions in lists, e.g. `model.policy.lora.rank`."""
    value: str
    """The text of a single value; "" where the value is a mapping or a list."""
    place: str
    """`file:line`; "" on the command line."""


class Option(NamedTuple):
    """One parameter of a class that the run names."""

    path: str
    """Full dotted path, e.g. `model.init_args.policy.init_args.lora.rank`."""
    owner: type
    required: bool


def config_files(argv: Sequence[str]) -> list[Path]:
    """The files given by --config."""
    return [Path(value) for value in config_values(argv) if Path(value).is_file()]


def config_values(argv: Sequence[str]) -> list[str]:
    """The words that follow each --config."""
    values = [value for flag, value in pairwise(argv) if flag in ("--config", "-c")]
    return values + [word.split("=", 1)[1] for word in argv if word.startswith("--config=")]


def short(path: str) -> str:
    """A dotted path without `init_args` and positions in lists: what people say."""
    return ".".join(part for part in path.split(".") if part not in ("init_args", "fit", "config") and not part.isdigit())


def settings(argv: Sequence[str]) -> list[Setting]:
    """Everything that the run's files and command line set, in the order in which later ones win. Files must be YAML."""
    found = [Setting(path, value, f"{file}:{line}") for file in config_files(argv) for path, value, line in keys_of(file)]
    return found + [Setting(path, value, "") for path, value in options_of(argv)]


def options(argv: Sequence[str]) -> list[Option]:
    """The parameters of the trainer and of every class that the run names, with the fields of parameters that are dataclasses."""
    import lightning as L

    from lit_rl.command_line.usual import RunFolder

    found = [
        Option(name, L.Trainer, False) for name in ("model", "data", "trainer", "run", "config_version", "seed_everything", "ckpt_path")
    ]
    found += constructor_options(L.Trainer, "trainer") + constructor_options(RunFolder, "run")
    for path, class_path in named_classes(argv).items():
        found += constructor_options(imported_class(class_path), f"{path}.init_args")
    return found


def named_classes(argv: Sequence[str]) -> dict[str, str]:
    """Class path by the full dotted path of the key that names it."""
    found: dict[str, str] = {}
    for file in config_files(argv):
        found |= {path.removesuffix(".class_path"): value for path, value, _ in keys_of(file, full=True) if path.endswith(".class_path")}
    for path, value in options_of(argv, full=True):
        if path.endswith(".class_path") or (inspect.isclass(imported(value)) and "." in value):
            found[_with_init_args(path.removesuffix(".class_path"), found)] = value
    return found


def with_help_classes(argv: Sequence[str]) -> list[str]:
    """The words of a command line, `--model.policy.help` being followed by the class that the run names there."""
    completed: list[str] = []
    for word, following in pairwise([*argv, "--"]):
        completed.append(word)
        if word.startswith("--") and word.endswith(".help") and following.startswith("--"):
            named = {short(path): class_path for path, class_path in named_classes(argv).items()}
            completed += [named[path]] if (path := short(word[2:].removesuffix(".help"))) in named else []
    return completed


def nearest(name: str, known: Sequence[Option]) -> str | None:
    """The full path of the option that was probably meant by the dotted `name`: the same last words, else the most similar last word."""
    words = short(name).split(".")
    paths = [option.path for option in known]
    same = [path for path in paths if path.split(".")[-1] == words[-1] and path != name]
    if not same:
        leaves = {path.split(".")[-1] for path in paths}
        close = difflib.get_close_matches(words[-1], leaves, n=1, cutoff=0.6)
        same = [path for path in paths if close and path.split(".")[-1] == close[0]]
    return max(same, key=lambda path: (_shared(words[:-1], short(path).split(".")[:-1]), -len(path)), default=None)


def _shared(words: Sequence[str], others: Sequence[str]) -> int:
    """How many of `words` stand in `others` too, misspelt ones counting half."""
    return sum(2 if word in others else bool(difflib.get_close_matches(word, others, n=1)) for word in words)


def keys_of(file: Path, *, full: bool = False) -> Iterator[tuple[str, str, int]]:
    """Dotted path, single value and line of every key of a YAML file."""

    def walk(node: object, path: tuple[str, ...]) -> Iterator[tuple[str, str, int]]:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                inner = (*path, str(key.value))
                text = value.value if isinstance(value, yaml.ScalarNode) else ""
                if full or key.value != "init_args":
                    yield ".".join(inner) if full else short(".".join(inner)), text, key.start_mark.line + 1
                yield from walk(value, inner)
        elif isinstance(node, yaml.SequenceNode):
            for i, value in enumerate(node.value):
                yield from walk(value, (*path, str(i)))

    yield from walk(yaml.compose(file.read_text(encoding="utf-8")), ())


def options_of(argv: Sequence[str], *, full: bool = False) -> Iterator[tuple[str, str]]:
    """Path and value of every option of a command line but --config."""
    for word, following in pairwise([*argv, ""]):
        if word.startswith("--") and word not in ("--config", "--"):
            path, given, value = word.removeprefix("--").partition("=")
            yield (path if full else short(path)).rstrip("+"), value if given else "" if following.startswith("--") else following


def _with_init_args(path: str, classes: dict[str, str]) -> str:
    """`model.policy` as `model.init_args.policy`, where `model` names a class."""
    first, *words = (word for word in path.split(".") if word != "init_args")
    for word in words:
        first += f".init_args.{word}" if first in classes else f".{word}"
    return first


def constructor_options(cls: type | None, prefix: str) -> list[Option]:
    """The parameters of a class's constructor and of those that it hands `**kwargs` on to."""
    found: dict[str, Option] = {}
    if cls is None:
        return []
    for owner in inspect.getmro(cls):
        if "__init__" not in vars(owner):
            continue
        signature = inspect.signature(owner.__init__)
        for name, parameter in signature.parameters.items():
            if name == "self" or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) or name in found:
                continue
            found[name] = Option(f"{prefix}.{name}", cls, parameter.default is parameter.empty)
            found |= {f"{name}.{f}": Option(f"{prefix}.{name}.{f}", cls, False) for f in _fields(owner, name)}
        if not any(parameter.kind == parameter.VAR_KEYWORD for parameter in signature.parameters.values()):
            break
    return list(found.values())


def _fields(cls: type, parameter: str) -> list[str]:
    """Options of a parameter that is, or may be, a dataclass or a class that nothing can stand in for."""
    try:
        hint = typing.get_type_hints(cls.__init__)[parameter]
    except (NameError, KeyError, TypeError):  # an annotation that only a type checker understands
        return []
    kinds = [hint, *typing.get_args(hint)]
    fields = [field.name for kind in kinds if dataclasses.is_dataclass(kind) for field in dataclasses.fields(kind)]
    whole = [kind for kind in kinds if getattr(kind, "__final__", False) and not dataclasses.is_dataclass(kind)]
    return fields + [name for kind in whole for name in inspect.signature(kind).parameters]
