"""Imports only go down: formulas know no models, models no methods, methods not each other."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
FORMULAS = [
    "lit_rl.advantages",
    "lit_rl.decay",
    "lit_rl.meters",
    "lit_rl.losses",
    "lit_rl.packing",
    "lit_rl.partition",
    "lit_rl.samplers",
    "lit_rl.token_advantages",
]
LOW = ["lit_rl.types", "lit_rl.errors", "lit_rl.seeding", "lit_rl.own_code"]
MIDDLE = ["lit_rl.policies", "lit_rl.rewards", "lit_rl.rollouts", "lit_rl.checkpoints"]
MODULE = [
    "lit_rl.module",
    "lit_rl.policy_module",
    "lit_rl.flow_module",
    "lit_rl.token_module",
    "lit_rl.generation_module",
    "lit_rl.policy_gradient_module",
    "lit_rl.token_exchange",
    "lit_rl.credit",
]
MAY_IMPORT = {
    "lit_rl/types.py": [],
    "lit_rl/own_code": ["lit_rl.errors"],
    **{name.replace(".", "/"): FORMULAS for name in FORMULAS},
    "lit_rl/policies": [*LOW, *FORMULAS, "lit_rl.policies", "lit_rl.checkpoints.ip_adapter", "lit_rl.checkpoints.weights"],
    "lit_rl/rewards": [*LOW, "lit_rl.rewards"],
    "lit_rl/rollouts": [*LOW, *FORMULAS, "lit_rl.policies", "lit_rl.rollouts", "lit_rl.rewards.addresses", "lit_rl.rewards.answers"],
    "lit_rl/checkpoints": [*LOW, "lit_rl.checkpoints"],
    "lit_rl/module.py": [*LOW, *FORMULAS, *MIDDLE, "lit_rl.strategies"],
    "lit_rl/policy_module.py": [*LOW, *MIDDLE, "lit_rl.module", "lit_rl.strategies"],
    "lit_rl/flow_module.py": [*LOW, *FORMULAS, *MIDDLE, *MODULE],
    "lit_rl/token_module.py": [*LOW, *FORMULAS, *MIDDLE, *MODULE],
    "lit_rl/generation_module.py": [*LOW, *FORMULAS, *MIDDLE, *MODULE],
    "lit_rl/policy_gradient_module.py": [*LOW, *FORMULAS, *MIDDLE, *MODULE],
    "lit_rl/token_exchange.py": [*LOW, *MODULE],
    "lit_rl/methods": [*LOW, *FORMULAS, *MIDDLE, *MODULE],
    "callbacks": ["lit_rl", "callbacks"],
    "datamodules": ["lit_rl", "datamodules"],
}
OURS = ("lit_rl", "callbacks", "datamodules")


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return {name for name in found if name.split(".")[0] in OURS}


def files(room: str) -> list[Path]:
    path = ROOT / room
    return sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]


def test_imports_only_go_down() -> None:
    wrong = []
    for room, allowed in MAY_IMPORT.items():
        assert files(room) and all(file.is_file() for file in files(room)), f"{room} is not there"
        for file in files(room):
            own = ".".join(file.relative_to(ROOT).with_suffix("").parts)
            for name in imports(file) - {own}:
                if not any(name == a or name.startswith(a + ".") for a in allowed):
                    wrong.append(f"{file.relative_to(ROOT)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_methods_do_not_import_each_other() -> None:
    for file in files("lit_rl/methods"):
        assert not {name for name in imports(file) if name.startswith("lit_rl.methods")}, file


def test_formulas_know_neither_lightning_nor_models() -> None:
    for room in FORMULAS:
        for file in files(room.replace(".", "/")):
            heavy = ("import lightning", "import diffusers", "import transformers", "torch.distributed")
            assert not [word for word in heavy if word in file.read_text()], file
