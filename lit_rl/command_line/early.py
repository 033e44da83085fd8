"""Mistakes in a run's files that can be told before torch and Lightning are imported, which takes seconds.

Classes of this project are read from their sources, without running them. What is not certain from there is left to the full parse: other
people's classes, a class or a list that a later file or option of the run replaces, constructors that do anything with `**kwargs` but hand
them on to their base.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from lit_rl.command_line.errors import no_option
from lit_rl.command_line.options import config_files, config_values, keys_of, options_of, short
from lit_rl.command_line.renamed import other_version, renamed
from lit_rl.command_line.usual_classes import USUAL_CLASSES
from lit_rl.command_line.yaml_files import CLASS_KEYS, broken_yaml, missing_file

ROOT = Path(__file__).parents[2]
PACKAGES = ("lit_rl", "callbacks", "datamodules")
COMMANDS = ("fit", "validate", "test", "predict")
WITHOUT_OPTIONS = ("ABC", "Protocol", "Generic")
"""Bases whose constructors take nothing."""


class Source(NamedTuple):
    """A class as its file has it."""

    module: str
    node: ast.ClassDef


def early_mistake(argv: Sequence[str]) -> str | None:
    """The sentence for a --config file that is missing, broken or of another release, or that has a key which its class does not know."""
    if any(word in ("-h", "--help") or ".help" in word for word in argv):
        return None
    return missing_file(argv) or broken_yaml(argv) or other_version(argv) or unknown_key(argv)


def unknown_key(argv: Sequence[str]) -> str | None:
    """The sentence for the first key of a YAML file that a class of this project certainly does not have."""
    if len(config_files(argv)) != len(config_values(argv)):
        return None  # a mapping in the place of a file
    files = config_files(argv)
    given = [(path, value, f"{file}:{line}") for file in files for path, value, line in keys_of(file, full=True)]
    if any("<<" in path.split(".") or path.split(".")[0] in COMMANDS for path, _, _ in given):
        return None
    replaced = {short(path).removesuffix(".class_path") for path, value in options_of(argv, full=True)}
    replaced |= {path for path, count in Counter(_lists_of(files)).items() if count > 1}
    values: dict[str, set[str]] = {}
    for path, value, _ in given:
        if value:
            values.setdefault(path.removesuffix(".class_path"), set()).add(value)
    for path, _, place in given:
        parts = path.split(".")
        above = [".".join(parts[:n]) for n in range(1, len(parts))]
        if any(len(values.get(one, ())) > 1 or short(one).removesuffix("+") in replaced for one in above):
            continue
        if sentence := _usual(parts) if parts[:2] == ["run", "callbacks"] else _of_class(path, values):
            whole = short(path)
            new = renamed(whole)
            return f"{place}: {whole} of earlier releases is now {new}" if new else f"{place}: {sentence}"
    return None


def _lists_of(files: Sequence[Path]) -> Iterator[str]:
    """The short path of every list of a file that holds classes, once for each file: a list takes the place of an earlier file's."""
    for file in files:
        parts = [path.split(".") for path, _, _ in keys_of(file, full=True)]
        yield from {short(".".join(p[:i])).removesuffix("+") for p in parts for i, part in enumerate(p) if part.isdigit()}


def _of_class(path: str, values: Mapping[str, set[str]]) -> str | None:
    """The sentence for a key in the `init_args` of a class that the files name, if the class certainly does not have it."""
    holder, _, key = path.rpartition(".init_args.")
    class_path = next(iter(values.get(holder, ())), "") if holder else ""
    return _checked(class_path, key) if class_path else None


def _usual(parts: Sequence[str]) -> str | None:
    """The sentence for a key `run.callbacks.NAME.KEY` that no class of the callback NAME has, or for a NAME that no run has."""
    name, key = [*parts[2:4], "", ""][:2]
    if name and name not in USUAL_CLASSES:
        return no_option("run.callbacks", name, sorted(USUAL_CLASSES))
    sentences = [_checked(class_path, key) for class_path in USUAL_CLASSES[name]] if key and len(parts) == 4 else [None]
    return f"run.callbacks.{name}: {sentences[0]}" if all(sentences) else None


def _checked(class_path: str, key: str) -> str | None:
    """The sentence for a key of the init_args of a class, `width` or `lora.rank`, that the class certainly does not have."""
    source = source_of(class_path)
    if source is None or (known := parameters(source)) is None:
        return None
    name, _, field = key.partition(".")
    if name not in known:
        return None if field else no_option(source.node.name, name, sorted(known))
    part = _component(*known[name]) if field and "." not in field else None
    fields = parameters(part) if part else None
    return no_option(source.node.name, field, sorted(fields)) if fields and field not in (*fields, *CLASS_KEYS) else None


@cache
def _tree(module: str) -> ast.Module | None:
    """The source of a module of this project, parsed; None for any other module."""
    file = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    if module.split(".")[0] not in PACKAGES or not file.is_file():
        return None
    return ast.parse(file.read_bytes())


def source_of(class_path: str) -> Source | None:
    """The class that a dotted path names, if one of this project's files defines it once."""
    module, _, name = class_path.rpartition(".")
    tree = _tree(module) if module else None
    found = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name] if tree else []
    return Source(module, found[0]) if len(found) == 1 else None


def parameters(source: Source) -> dict[str, tuple[str, ast.expr | None]] | None:
    """Module and annotation of each parameter of a class's constructor and of those that get its `**kwargs`; None if that is uncertain."""
    module, node = source
    decorators = {_last_name(decorator) for decorator in node.decorator_list}
    if node.keywords or not decorators <= {"dataclass", "final"} or any(_is_function(inner, "__new__") for inner in node.body):
        return None
    init = next((inner for inner in node.body if isinstance(inner, ast.FunctionDef) and inner.name == "__init__"), None)
    found: dict[str, tuple[str, ast.expr | None]] = {}
    if "dataclass" in decorators and init is None:
        if any(_uncertain_field(inner) for inner in node.body):
            return None
        found = {i.target.id: (module, i.annotation) for i in node.body if isinstance(i, ast.AnnAssign) and isinstance(i.target, ast.Name)}
    elif init is not None:
        arguments = init.args
        found = {a.arg: (module, a.annotation) for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs) if a.arg != "self"}
        if arguments.kwarg is None:
            return found
        if init.decorator_list or not _hands_on(init, arguments.kwarg.arg):
            return None
    for base in node.bases:
        if _last_name(base) in WITHOUT_OPTIONS:
            continue
        above = named(module, base)
        inherited = parameters(above) if above else None
        if inherited is None:
            return None
        found = inherited | found
    return found


def _hands_on(init: ast.FunctionDef, kwargs: str) -> bool:
    """True if a constructor uses its `**kwargs` in one way only: `super().__init__(..., **kwargs)`."""
    uses = sum(isinstance(node, ast.Name) and node.id == kwargs for node in ast.walk(init))
    calls = [node for node in ast.walk(init) if isinstance(node, ast.Call) and ast.unparse(node.func) == "super().__init__"]
    handed = [word for call in calls for word in call.keywords if word.arg is None and ast.unparse(word.value) == kwargs]
    return uses == len(handed) == 1


def _component(module: str, annotation: ast.expr | None) -> Source | None:
    """The class of a parameter in whose place no other can stand, a final one, or None."""
    kinds = [kind for kind in _kinds(annotation) if not (isinstance(kind, ast.Constant) and kind.value is None)]
    source = named(module, kinds[0]) if len(kinds) == 1 else None
    names = {_last_name(decorator) for decorator in source.node.decorator_list} if source else set()
    return source if "final" in names else None


def _kinds(annotation: ast.expr | None) -> Iterator[ast.expr]:
    if isinstance(annotation, ast.BinOp):
        yield from _kinds(annotation.left)
        yield from _kinds(annotation.right)
    elif annotation is not None:
        yield annotation


def named(module: str, name: ast.expr) -> Source | None:
    """The class that a plain name means in a module of this project: one of its own, or one that it imports from another file."""
    if isinstance(name, ast.Subscript):
        name = name.value
    tree = _tree(module)
    if tree is None or not isinstance(name, ast.Name):
        return None
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                if (alias.asname or alias.name) == name.id:
                    return source_of(f"{node.module}.{alias.name}")
    return source_of(f"{module}.{name.id}")


def _is_function(node: ast.stmt, name: str) -> bool:
    return isinstance(node, ast.FunctionDef) and node.name == name


def _uncertain_field(node: ast.stmt) -> bool:
    """A class variable, or a field with settings of its own, such as `field(init=False)`."""
    return isinstance(node, ast.AnnAssign) and ("ClassVar" in (text := ast.unparse(node)) or "init=" in text or "KW_ONLY" in text)


def _last_name(node: ast.expr) -> str:
    """`dataclass` of `dataclasses.dataclass(frozen=True)`."""
    while isinstance(node, ast.Call | ast.Subscript):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
