"""The options of a run's method and data, read off the signatures of their classes without importing them."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from pathlib import Path

from lit_rl.command_line.early import Source, named, parameters, source_of
from lit_rl.platform.templates import at, read

Option = dict[str, object]
PARTS = {"model": "model", "data": "data", "policy": "model.init_args.policy"}


def form_of(template: Path) -> dict[str, object]:
    """Returns class, help and options of a run file's method, policy and data; an option has key, type, default, value there, help."""
    tree = read(template)
    parts = {}
    for part, key in PARTS.items():
        class_path = str(at(tree, f"{key}.class_path") or "")
        source = source_of(class_path)
        known = parameters(source) if source else None
        if source is not None and known is not None:
            parts[part] = {"class_path": class_path, "help": summary(source), "options": _options(source, known, key, tree)}
    return {"template": template.stem, "parts": parts}


def _options(source: Source, known: Mapping[str, tuple[str, ast.expr | None]], key: str, tree: object) -> list[Option]:
    defaults, texts = _defaults(source), helps(source)
    return [
        {
            "key": f"{key}.init_args.{name}", "name": name, "type": ast.unparse(annotation) if annotation is not None else "",
            "default": defaults.get(name), "required": name not in defaults, "value": at(tree, f"{key}.init_args.{name}"),
            "help": texts.get(name, ""),
        }
        for name, (_, annotation) in known.items()
    ]  # fmt: skip


def summary(source: Source) -> str:
    """The first sentence of a class's docstring."""
    return (ast.get_docstring(source.node) or "").split("\n\n")[0].replace("\n", " ")


def helps(source: Source) -> dict[str, str]:
    """The help of each option in the docstring's `Args:`, those of its bases included."""
    found: dict[str, str] = {}
    for cls in lineage(source):
        text = (ast.get_docstring(cls.node) or "").partition("Args:\n")[2]
        block = re.split(r"\n(?=\S)", text)[0]
        for name, said in re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", block, re.MULTILINE):
            found.setdefault(name, " ".join(said.split()))
    return found


def _defaults(source: Source) -> dict[str, str]:
    """The source of each option's default."""
    found: dict[str, str] = {}
    for cls in lineage(source):
        for init in (node for node in cls.node.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"):
            arguments = init.args
            plain = [*arguments.posonlyargs, *arguments.args]
            given = zip(plain[len(plain) - len(arguments.defaults) :], arguments.defaults)
            for argument, value in [*given, *zip(arguments.kwonlyargs, arguments.kw_defaults)]:
                if value is not None:
                    found.setdefault(argument.arg, ast.unparse(value))
    return found


def lineage(source: Source) -> list[Source]:
    """A class and its bases of this project, the class first."""
    found = [source]
    for base in source.node.bases:
        above = named(source.module, base)
        found += lineage(above) if above is not None else []
    return found
