"""Names in annotations exist. Neither mypy nor ruff is asked: shape strings such as "B *D" would be undefined names to both."""

import ast
import builtins
from collections.abc import Iterator

from benchmarks.house import sources


def annotations(tree: ast.Module) -> Iterator[ast.expr]:
    for node in ast.walk(tree):
        if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
            yield node.annotation
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.returns is not None:
            yield node.returns


def undefined(source: str) -> set[str]:
    """Names in annotations of a file that it neither imports nor defines anywhere."""
    tree = ast.parse(source)
    known = set(dir(builtins))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            known |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            known.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            known.add(node.id)
    used = {name.id for annotation in annotations(tree) for name in ast.walk(annotation) if isinstance(name, ast.Name)}
    return used - known


def test_every_name_in_an_annotation_is_imported_or_defined() -> None:
    assert not {module: names for module, source in sources().items() if (names := undefined(source))}


def test_a_missing_import_is_found() -> None:
    source = 'from torch import Tensor\ndef f(x: Float[Tensor, "B *D"], y: Missing | None) -> list[Tensor]: ...'
    assert undefined(source) == {"Float", "Missing"}
