"""The house: every room and every file beside the rooms has its floor, and imports only go down."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from benchmarks.house import FORMULAS, ROOT, circles, imports, sources

FLOORS: Sequence[Sequence[str]] = (
    ("lit_rl.errors",),
    ("lit_rl.types", "lit_rl.seeding", "lit_rl.own_code", "lit_rl.ranks", "lit_rl.net", "lit_rl.trackers"),
    ("lit_rl.losses", "lit_rl.samplers"),
    ("lit_rl.credit", "lit_rl.miniatures"),
    ("lit_rl.checkpoints", "lit_rl.envs", "lit_rl.rewards"),
    ("lit_rl.policies", "lit_rl.evaluation"),
    ("lit_rl.rollouts", "lit_rl.strategies", "lit_rl.surgery"),
    ("lit_rl.replay",),
    ("lit_rl.agents",),
    ("lit_rl.modules",),
    ("lit_rl.methods",),
    ("callbacks", "datamodules"),
    ("lit_rl.replay.__main__", "lit_rl.command_line", "lit_rl.prepare", "lit_rl.merge", "lit_rl.judges", "lit_rl.migrate"),
    ("lit_rl.demo", "lit_rl.doctor", "lit_rl.launch", "lit_rl.platform", "cli"),
)
"""Rooms and files from the ground up. A file imports from its own room and from floors below, never from its own floor's other rooms."""


DERIVED = {"lit_rl.methods.agent_grpo": {"lit_rl.methods.grpo.GRPO"}}
"""Methods of a file of their own that are another method with other rollouts: agents play episodes, and learn as GRPO does."""


def room_of(module: str, rooms: Mapping[str, int]) -> str | None:
    """The room that a dotted module is in: the longest name in `rooms` that it begins with."""
    parts = module.split(".")
    names = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((name for name in names if name in rooms), None)


def wrong_ways(files: Mapping[str, str], floors: Sequence[Sequence[str]]) -> list[str]:
    """Sentences about imports that do not go down, and about files without a floor. files: source by dotted name."""
    rooms = {room: floor for floor, names in enumerate(floors) for room in names}
    wrong = []
    for module, source in files.items():
        here = room_of(module, rooms)
        if here is None:
            wrong.append(f"{module} is in no room")
            continue
        for name in sorted(imports(source)):
            there = room_of(name, rooms)
            if there is None:
                wrong.append(f"{module} imports {name}, which is in no room")
            elif there != here and rooms[there] >= rooms[here]:
                wrong.append(f"{module} (floor {rooms[here]}) imports {name} (floor {rooms[there]})")
    return wrong


def test_imports_only_go_down() -> None:
    assert not wrong_ways(sources(), FLOORS)


def test_no_file_imports_itself_over_others() -> None:
    assert not circles(sources())
    files = {"lit_rl.a": "def f():\n    from lit_rl.b import g", "lit_rl.b": "from lit_rl.c import h", "lit_rl.c": "", "lit_rl.d": ""}
    assert not circles(files)
    files |= {"lit_rl.c": "if TYPE_CHECKING:\n    import lit_rl.a", "lit_rl.d": "import lit_rl.a"}
    assert circles(files) == {"lit_rl.a", "lit_rl.b", "lit_rl.c"}


def test_every_room_exists() -> None:
    for room in (name for floor in FLOORS for name in floor):
        path = ROOT / room.replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").is_file(), room


def test_an_import_that_goes_up_or_sideways_is_told() -> None:
    floors = (("lit_rl.losses",), ("lit_rl.policies", "lit_rl.rewards"), ("lit_rl.methods",))
    down = {"lit_rl.methods.x": "from lit_rl.losses.y import z\nimport lit_rl.policies.q", "lit_rl.policies.q": "import torch"}
    assert wrong_ways(down, floors) == []
    up = {"lit_rl.losses.y": "if TYPE_CHECKING:\n    from lit_rl.methods.x import M"}
    assert wrong_ways(up, floors) == ["lit_rl.losses.y (floor 0) imports lit_rl.methods.x.M (floor 2)"]
    sideways = {"lit_rl.policies.q": "def f():\n    from lit_rl.rewards import base"}
    assert wrong_ways(sideways, floors) == ["lit_rl.policies.q (floor 1) imports lit_rl.rewards.base (floor 1)"]
    assert wrong_ways({"lit_rl.loose": ""}, floors) == ["lit_rl.loose is in no room"]
    assert wrong_ways({"lit_rl.methods.x": "import lit_rl.loose"}, floors) == ["lit_rl.methods.x imports lit_rl.loose, which is in no room"]


def test_methods_do_not_import_each_other() -> None:
    for name, source in sources().items():
        if name.startswith("lit_rl.methods."):
            wanted = {found for found in imports(source) if found.startswith("lit_rl.methods")}
            assert wanted <= DERIVED.get(name, set()), name


def test_formulas_know_neither_lightning_nor_models() -> None:
    heavy = ("import lightning", "import diffusers", "import transformers", "torch.distributed")
    for name, source in sources().items():
        if name.startswith(FORMULAS):
            assert not [word for word in heavy if word in source], name


def collectives(files: Mapping[str, str]) -> set[str]:
    """Files that call a collective of torch.distributed, or Lightning's of tensors, themselves."""
    call = re.compile(
        r"(torch\.distributed|dist)\.(all_|broadcast|gather|scatter|reduce|barrier|send|recv|i?send|new_group)|self\.all_gather\("
    )
    return {name for name, source in files.items() if call.search(source)}


def test_collectives_are_in_one_file() -> None:
    """But for what strategies do by themselves."""
    assert collectives(sources()) == {"lit_rl.ranks"}
    assert collectives({"a": "import torch\ntorch.distributed.all_reduce(x)", "b": "strategy.broadcast(x)"}) == {"a"}
