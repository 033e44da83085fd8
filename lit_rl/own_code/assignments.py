"""Values that a Python configuration file (mmengine's) assigns, read from its source: nothing in it is executed."""

from __future__ import annotations

import ast
import os
from collections.abc import Mapping
from pathlib import Path

from lit_rl.errors import ConfigError


def assigned(file: Path) -> dict[str, object]:
    """The value of every name that the file assigns.

    Understood are literals, names assigned before, `dict(...)`, lists, f-strings, `+`, `os.path.join`, `os.environ.get` (and `os.getenv`,
    `os.environ[...]`) and, under `with read_base():`, imports of names from a file beside it. A class is its name. Raises ConfigError that
    names file and line for anything else, and for text that is no Python.
    """
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: this is not Python: {error}") from error
    names: dict[str, object] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and all(isinstance(target, ast.Name) for target in node.targets):
            value = _value(node.value, names, file)
            names |= {target.id: value for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.With) and ast.unparse(node.items[0].context_expr) == "read_base()":
            for inner in node.body:
                names |= _of_base(inner, file)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names |= {alias.asname or alias.name: alias.name for alias in node.names}  # a class or function: its name
        elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            raise _refused(node, file)
    return names


def _of_base(node: ast.stmt, file: Path) -> Mapping[str, object]:
    if not isinstance(node, ast.ImportFrom) or not node.level or not node.module:
        raise _refused(node, file)
    folder = file.parents[node.level - 1]
    base = folder.joinpath(*node.module.split(".")).with_suffix(".py")
    if not base.is_file():
        raise ConfigError(f"{file}:{node.lineno}: {ast.unparse(node)}: there is no {base}; copy it beside this file")
    found = assigned(base)
    if any(alias.name == "*" for alias in node.names):
        return found
    if missing := [alias.name for alias in node.names if alias.name not in found]:
        raise ConfigError(f"{file}:{node.lineno}: {base} assigns no {missing[0]}")
    return {alias.asname or alias.name: found[alias.name] for alias in node.names}


def _value(node: ast.expr, names: Mapping[str, object], file: Path) -> object:
    def inner(part: ast.expr) -> object:
        return _value(part, names, file)

    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name) and node.id in names:
        return names[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [inner(part) for part in node.elts]
    if isinstance(node, ast.Dict) and None not in node.keys:
        return {inner(key): inner(value) for key, value in zip(node.keys, node.values) if key is not None}
    if isinstance(node, ast.JoinedStr):
        return "".join(str(inner(part.value if isinstance(part, ast.FormattedValue) else part)) for part in node.values)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(number := inner(node.operand), int | float):
        return -number
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _sum(inner(node.left), inner(node.right), node, file)
    if isinstance(node, ast.Call | ast.Subscript):
        return _called(node, names, file)
    raise _refused(node, file)


def _sum(left: object, right: object, node: ast.expr, file: Path) -> object:
    if isinstance(left, str) and isinstance(right, str):
        return left + right
    if isinstance(left, list) and isinstance(right, list):
        return left + right
    if isinstance(left, int | float) and isinstance(right, int | float):
        return left + right
    raise _refused(node, file)


def _called(node: ast.Call | ast.Subscript, names: Mapping[str, object], file: Path) -> object:
    """`dict(...)` and the few functions that configurations use for paths."""
    if isinstance(node, ast.Subscript):
        words = [_value(node.slice, names, file)] if ast.unparse(node.value) == "os.environ" else []
        function = "os.environ.get" if words else ""
    else:
        function, words = ast.unparse(node.func), [_value(word, names, file) for word in node.args]
        if function == "dict" and not words and all(word.arg for word in node.keywords):
            return {str(word.arg): _value(word.value, names, file) for word in node.keywords}
    texts = [word for word in words if isinstance(word, str)]
    if len(texts) < len(words) or not texts:
        raise _refused(node, file)
    if function == "os.path.join":
        return os.path.join(*texts)
    if function == "os.path.expanduser":
        return os.path.expanduser(texts[0])
    if function in ("os.environ.get", "os.getenv"):
        found = os.environ.get(texts[0], texts[1] if len(texts) > 1 else None)
        if found is None:
            raise ConfigError(f"{file}:{node.lineno}: {texts[0]} is not set in the environment: set it and try again")
        return found
    raise _refused(node, file)


def _refused(node: ast.stmt | ast.expr, file: Path) -> ConfigError:
    source = ast.unparse(node).splitlines()[0][:80]
    return ConfigError(
        f"{file}:{node.lineno}: `{source}` is more than an assignment of values, and nothing of the file is executed: write the value there"
    )
