"""The run files that jobs begin with: those below `configs/`, by algorithm."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path

import yaml

from lit_rl.platform.places import file_below

USUAL: Mapping[str, str] = {"flow_grpo": "sd35m_ocr", "diffusion_nft": "sd35m_multi_reward", "deepgen": "flow_grpo"}
"""The template of an algorithm whose first file is not the one that people begin with."""

NO_ALGORITHM = ("base", "demo")
Tree = dict[str, object]


def algorithms(root: Path) -> list[str]:
    """Algorithms that have a template."""
    return sorted(folder.name for folder in (root / "configs").iterdir() if folder.name not in NO_ALGORITHM and any(folder.glob("*.yaml")))


def templates(root: Path, algorithm: str) -> list[str]:
    """Run files of an algorithm, relative to the repository, those of the demos at the end."""
    own, demos = sorted((root / "configs" / algorithm).glob("*.yaml")), sorted((root / "configs/demo").glob(f"{algorithm}_*.yaml"))
    first = [path for path in own if path.stem == USUAL.get(algorithm)]
    return [str(path.relative_to(root)) for path in dict.fromkeys([*first, *own, *demos])]


def find(root: Path, algorithm: str, template: str | None) -> Path:
    """The run file of a job. Raises ValueError with a sentence for one that is not below `configs/`."""
    if algorithm not in (known := algorithms(root)):
        raise ValueError(f"algorithm {algorithm!r} is none of {', '.join(known)}")
    if template is None:
        return root / templates(root, algorithm)[0]
    path = file_below(root / "configs", root / template)
    if path is None or path.suffix != ".yaml":
        raise ValueError(f"template {template[:200]!r} is no run file below configs/, such as {templates(root, algorithm)[0]}")
    return path


def read(path: Path) -> Tree:
    """The mapping of a YAML file."""
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(tree, dict)
    return tree


def at(tree: object, dotted: str) -> object:
    """The value under a dotted key, None where there is none."""
    for part in dotted.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def put(tree: Tree, dotted: str, value: object) -> None:
    """Set a dotted key."""
    *above, last = dotted.split(".")
    for part in above:
        below = tree.setdefault(part, {})
        if not isinstance(below, dict):
            below = tree[part] = {}
        tree = below
    tree[last] = value


def laid_over(under: Tree, over: Tree) -> Tree:
    """Two mappings as one; values of the second win, mappings are merged, those of another class replaced."""
    if over.get("class_path", under.get("class_path")) != under.get("class_path"):
        return deepcopy(over)
    result = deepcopy(under)
    for key, value in over.items():
        below = result.get(key)
        result[key] = laid_over(below, value) if isinstance(below, dict) and isinstance(value, dict) else deepcopy(value)
    return result
