"""The size of the house: how much a reader has to know, measured on the source.

    python -m benchmarks.house

Prints a table of figures with the value of each and its limit, which `tests/test_house.py` holds. A figure that is not yet what is wanted
is held at its present value and marked. All but the inheritance depths, the constructor arguments and the files of a training step, see
`benchmarks.steps`, are read from the source without importing it. Functions are measured without their docstrings; FORMULAS are exempt.
"""

from __future__ import annotations

import ast
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
OURS = ("lit_rl", "callbacks", "datamodules", "cli")
FORMULAS = ("lit_rl.losses", "lit_rl.samplers", "lit_rl.credit")
"""Rooms of pure functions of tensors."""

LOOSE = {"lit_rl.errors", "lit_rl.ranks", "lit_rl.seeding", "lit_rl.types"}
"""The library files that may lie at the top of `lit_rl`, beside commands."""

UNTYPED = "type: ignore, cast and Any together"

parsed = lru_cache(maxsize=1024)(ast.parse)
Function = ast.FunctionDef | ast.AsyncFunctionDef


class Figure(NamedTuple):
    value: float
    detail: str = ""


@dataclass(frozen=True)
class Limit:
    """The bound of a figure.

    wanted: The value that the house is to reach. held: The value of today, while that is not met; remove it when it is.
    least: The figure must not fall below the bound; otherwise it must not rise above it.
    """

    wanted: float
    held: float | None = None
    least: bool = False

    @property
    def bound(self) -> float:
        return self.wanted if self.held is None else self.held

    def holds(self, value: float) -> bool:
        return value >= self.bound if self.least else value <= self.bound


LIMITS: Mapping[str, Limit] = {
    **dict.fromkeys(("files that a step of GRPO enters", "files that a step of Flow-GRPO enters"), Limit(6)),
    **dict.fromkeys(("depth of GRPO", "depth of DAPO", "depth of PPO"), Limit(4)),
    **dict.fromkeys(("depth of FlowGRPO", "depth of DiffusionNFT"), Limit(3)),
    **dict.fromkeys(("arguments of GRPO", "arguments of PPO", "arguments of FlowGRPO", "arguments of FluxFillPolicy"), Limit(20)),
    "loose files at the top of lit_rl": Limit(4),
    "files in import circles": Limit(0),
    "files over 250 lines": Limit(9),
    "lines of the longest file": Limit(320),
    "lines of the longest method file": Limit(250),
    "lines of a function, p90": Limit(19),
    "lines of a function, max": Limit(50),
    UNTYPED: Limit(411),  # two thirds of 617, before the house was rebuilt
    "private names of Lightning": Limit(12),
    "% of public functions with a docstring": Limit(85, least=True),
    "docstrings that are fragments": Limit(0),
    "lines of the longest shipped YAML": Limit(45),
}


def sources() -> dict[str, str]:
    """Source of every file by dotted name, but the package's own docstring."""
    paths = [path for top in OURS[:3] for path in (ROOT / top).rglob("*.py")] + [ROOT / "cli.py"]
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path.read_text()
        for path in paths
        if path != ROOT / "lit_rl/__init__.py"
    }


def shipped() -> list[Path]:
    """Run files, without the overlays that they may be combined with."""
    return sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "base")


def imports(source: str) -> set[str]:
    """Modules of ours that a file imports, also inside functions and for type checkers alone."""
    found: set[str] = set()
    for node in ast.walk(parsed(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in OURS}


def circles(files: Mapping[str, str]) -> set[str]:
    """Files that import themselves over others, inside functions and for type checkers alone included."""
    graph = {
        name: {file for found in imports(source) if (file := _file_of(found, files)) not in ("", name)} for name, source in files.items()
    }
    return {name for name in graph if name in _reached(name, graph)}


def _reached(name: str, graph: Mapping[str, set[str]]) -> set[str]:
    """Nodes at the end of every way from `name` that has at least one step."""
    found, ahead = set[str](), set(graph[name])
    while ahead:
        found |= ahead
        ahead = set().union(*(graph[node] for node in ahead)) - found
    return found


def _file_of(module: str, files: Mapping[str, str]) -> str:
    return next((name for name in (module, module.rpartition(".")[0]) if name in files), "")


def loose(files: Mapping[str, str]) -> set[str]:
    """Files at the top of `lit_rl` that are no commands."""
    top = {name for name in files if re.fullmatch(r"lit_rl\.\w+", name) and (ROOT / f"{name.replace('.', '/')}.py").is_file()}
    return {name for name in top if 'if __name__ == "__main__"' not in files[name]}


def function_lines(source: str) -> list[tuple[int, str]]:
    """Lines and name of every function, nested ones included, from `def` to the end, without its docstring."""
    functions = (node for node in ast.walk(parsed(source)) if isinstance(node, Function))
    return [(_span(f) - (_span(f.body[0]) if ast.get_docstring(f) is not None else 0), f.name) for f in functions]


def _span(node: ast.stmt) -> int:
    return (node.end_lineno or 0) - node.lineno + 1


def public_functions(tree: ast.Module | ast.ClassDef) -> Iterator[Function]:
    """Functions and methods without an underscore, of classes without one."""
    for node in tree.body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node) if isinstance(node, ast.ClassDef) else (node,)


def documented(files: Mapping[str, str]) -> float:
    """Percentage of public functions that have a docstring."""
    have = [ast.get_docstring(function) is not None for source in files.values() for function in public_functions(parsed(source))]
    return 100 * sum(have) / len(have)


def fragments(source: str) -> list[str]:
    """Docstrings, those of variables included, that begin as no sentence does."""
    texts = (node.value for node in ast.walk(parsed(source)) if isinstance(node, ast.Expr))
    values = (text.value for text in texts if isinstance(text, ast.Constant) and isinstance(text.value, str))
    return [value for value in values if re.match(r"(What|Of|Whether) ", value)]


def untyped(source: str) -> Counter[str]:
    """How often a file silences the type checker (`type: ignore`), overrules it (`cast(`) and says nothing to it (`Any`)."""
    return Counter(re.findall(r"type: ignore|\bcast\(|\bAny\b", source))


def lightnings() -> set[str]:
    """Private names that Lightning defines."""
    spec = find_spec("lightning")
    assert spec is not None and spec.origin is not None
    texts = (path.read_text() for path in Path(spec.origin).parent.rglob("*.py"))
    return {name for text in texts for name in re.findall(r"(?:def |self\.|class |^)(_[a-zA-Z]\w*)", text, re.MULTILINE)}


def private_names(files: Mapping[str, str]) -> set[str]:
    """Private names of Lightning's objects that files read. Classes that inherit them are not looked at."""
    trees = [parsed(source) for source in files.values()]
    own = {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, Function | ast.ClassDef)}
    known, found = lightnings() - own, set[str]()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("lightning"):
            found |= {alias.name for alias in node.names if alias.name.startswith("_")}
        elif isinstance(node, ast.Attribute) and node.attr in known and not node.attr.startswith("__"):
            found |= {node.attr} if ast.unparse(node.value) not in ("self", "cls", "super()") else set()
    return found - {"_modules", "_parameters", "_buffers"}  # PyTorch's


def depth(cls: type) -> int:
    """Storeys of a method above LitRL."""
    from lit_rl.modules.base import LitRL

    return sum(issubclass(base, LitRL) for base in cls.__mro__) - 1


def arguments(cls: type) -> set[str]:
    """Names of a constructor's arguments, those of `**kwargs` included, as the command line resolves them."""
    from jsonargparse._parameter_resolvers import get_signature_parameters

    return {parameter.name for parameter in get_signature_parameters(cls, "__init__")}


def file_figures(files: Mapping[str, str]) -> dict[str, Figure]:
    lengths = sorted((len(source.splitlines()), name) for name, source in files.items())
    round_trips, marks = circles(files), sum(map(untyped, files.values()), Counter[str]())
    functions = sorted(item for name, source in files.items() if not name.startswith(FORMULAS) for item in function_lines(source))
    return {
        "loose files at the top of lit_rl": Figure(len(loose(files))),
        "files in import circles": Figure(len(round_trips), " ".join(sorted(round_trips))),
        "files over 250 lines": Figure(sum(length > 250 for length, _ in lengths)),
        "lines of the longest file": Figure(*lengths[-1]),
        "lines of the longest method file": Figure(*[item for item in lengths if item[1].startswith("lit_rl.methods")][-1]),
        "lines of a function, p90": Figure(functions[math.ceil(0.9 * len(functions)) - 1][0]),
        "lines of a function, max": Figure(*functions[-1]),
        UNTYPED: Figure(marks.total(), ", ".join(f"{count} {mark}" for mark, count in marks.items())),
        "private names of Lightning": Figure(len(private_names(files))),
        "% of public functions with a docstring": Figure(documented(files)),
        "docstrings that are fragments": Figure(sum(len(fragments(source)) for source in files.values())),
        "lines of the longest shipped YAML": Figure(*max((len(path.read_text().splitlines()), path.stem) for path in shipped())),
    }


def figures() -> dict[str, Figure]:
    from lit_rl.methods.diffusion_nft import DiffusionNFT
    from lit_rl.methods.flow_grpo import FlowGRPO
    from lit_rl.methods.grpo import DAPO, GRPO
    from lit_rl.methods.ppo import PPO
    from lit_rl.policies.flux_fill import FluxFillPolicy

    depths = {f"depth of {cls.__name__}": Figure(depth(cls)) for cls in (GRPO, DAPO, PPO, FlowGRPO, DiffusionNFT)}
    options = {f"arguments of {cls.__name__}": Figure(len(arguments(cls))) for cls in (GRPO, PPO, FlowGRPO, FluxFillPolicy)}
    return step_figures() | depths | options | file_figures(sources())


def step_figures() -> dict[str, Figure]:
    """The files that a step of each shipped recipe in `benchmarks.steps` enters; a miniature trains for an iteration."""
    from benchmarks.steps import RECIPES, step_files

    entered = {recipe: sorted(step_files(recipe)) for recipe in RECIPES}
    return {f"files that a step of {recipe} enters": Figure(len(files), " ".join(files)) for recipe, files in entered.items()}


def table(found: Mapping[str, Figure], limits: Mapping[str, Limit] = LIMITS) -> str:
    lines = [f"{'figure':40}{'value':>8}{'limit':>9}"]
    for name, (value, detail) in found.items():
        limit = limits[name]
        sign = ">=" if limit.least else "<="
        marks = [detail] if detail else []
        marks += [] if replace(limit, held=None).holds(value) else [f"NOT MET YET: {sign} {limit.wanted:g} is wanted"]
        marks += [] if limit.holds(value) else ["BROKEN"]
        lines.append(f"{name:40}{value:8.4g}{sign:>5}{limit.bound:4g}  {'; '.join(marks)}".rstrip())
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(figures()))
