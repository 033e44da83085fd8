"""Every test can fail: it asserts, or expects an error or a warning, itself or by a helper of the tests."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
EXPECTS = {"raises", "warns", "assert_close", "assert_array_equal"}
"""Functions of pytest, torch and numpy that fail where something is not as it is expected."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def called(node: ast.AST) -> Iterator[str]:
    """Names of functions that are called or handed to `partial` somewhere inside."""
    for part in ast.walk(node):
        if isinstance(part, ast.Call):
            function = part.func
            yield function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            if getattr(function, "id", "") == "partial":
                yield ast.unparse(part.args[0]).rpartition(".")[2]


def expects(node: ast.AST, helpers: set[str]) -> bool:
    return any(isinstance(part, ast.Assert) for part in ast.walk(node)) or bool(helpers & set(called(node)))


def helpers_of(tree: ast.Module, imported: dict[str, set[str]]) -> set[str]:
    """Names by which this file calls what can fail; imported: those of each file of the tests."""
    helpers = set(EXPECTS)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            helpers |= {name.asname or name.name for name in node.names} & imported.get((node.module or "").rpartition(".")[2], set())
    while True:
        found = {node.name for node in ast.walk(tree) if isinstance(node, Function) and expects(node, helpers)}
        found |= {ast.unparse(node.targets[0]) for node in tree.body if isinstance(node, ast.Assign) and expects(node.value, helpers)}
        found = {name for name in found if not name.startswith("test")}
        if found <= helpers:
            return helpers
        helpers |= found


def without_assertion(sources: dict[str, str]) -> list[str]:
    """`file:line name` of the tests among these files, by name, that cannot fail."""
    trees = {name: ast.parse(source) for name, source in sources.items()}
    helpers: dict[str, set[str]] = {name: set() for name in trees}
    while helpers != (found := {name: helpers_of(tree, helpers) for name, tree in trees.items()}):
        helpers = found
    return [
        f"{name}:{node.lineno} {node.name}"
        for name, tree in trees.items()
        for node in ast.walk(tree)
        if name.startswith("test_") and isinstance(node, Function) and node.name.startswith("test_") and not expects(node, helpers[name])
    ]


def test_every_test_can_fail() -> None:
    sources = {path.stem: path.read_text() for path in sorted(TESTS.rglob("*.py"))}
    assert len(sources) > 150
    assert without_assertion(sources) == []


@pytest.mark.parametrize(
    "body",
    [
        "assert 1",
        "with pytest.raises(ValueError): f()",
        "with pytest.warns(UserWarning): f()",
        "torch.testing.assert_close(a, b)",
        "near(a)",
        "outer(a)",
        "checked(a)",
        "close(a, b)",
        "async def inner():\n  assert 1\n asyncio.run(inner())",
    ],
)
def test_a_test_that_can_fail_is_found(body: str) -> None:
    here = (
        "from help import checked\nclose = partial(torch.testing.assert_close, rtol=0)\ndef near(x):\n assert x\ndef outer(x):\n near(x)\n"
    )
    assert without_assertion({"help": "def checked(x):\n assert x", "test_a": f"{here}def test_it():\n {body}\n"}) == []


@pytest.mark.parametrize("body", ["f()", "elsewhere(1)", "subprocess.run([], check=True)", "test_other()", "'assert 1'"])
def test_a_test_that_cannot_fail_is_found(body: str) -> None:
    sources = {"help": "def elsewhere(x):\n assert x", "test_a": f"def test_it():\n {body}\ndef test_other():\n assert 1\n"}
    assert without_assertion(sources) == ["test_a:1 test_it"]
