"""The house stays within its limits, and each measure is right on a few lines by hand."""

from __future__ import annotations

import torch

from benchmarks import house
from benchmarks.house import LIMITS, UNTYPED, Figure, Limit
from benchmarks.steps import entered
from lit_rl.modules.meters import Meters


def test_the_figures_keep_their_limits() -> None:
    """And the loss of a method is in its own file."""
    found = house.figures()
    assert found.keys() == LIMITS.keys()
    assert "BROKEN" not in (told := house.table(found)), told
    assert "lit_rl.methods.grpo" in found["files that a step of GRPO enters"].detail.split()
    assert "lit_rl.methods.flow_grpo" in found["files that a step of Flow-GRPO enters"].detail.split()


def test_files_are_entered_by_calls_of_their_functions_also_deep_down() -> None:
    def call() -> Meters:
        from lit_rl.credit.groups import group_advantages

        group_advantages(torch.ones(2), torch.zeros(2, dtype=torch.long))  # a formula
        meters = Meters()
        next(map(meters.mean, [{"a": 1.0}]))
        return meters

    meters, files = entered(call)
    assert bool(meters) and files == {"lit_rl.modules.meters"}
    assert entered(lambda: None) == (None, set())


def test_only_known_files_and_commands_are_loose() -> None:
    files = house.sources()
    assert house.loose(files) == house.LOOSE
    assert house.loose(files | {"lit_rl.errors": 'if __name__ == "__main__":\n    main()'}) == house.LOOSE - {"lit_rl.errors"}


def test_lines_of_functions_are_counted_without_docstrings() -> None:
    source = 'class A:\n @mark\n def f(self):\n  """One.\n\n  Two."""\n  async def g():\n   pass\n  return g\n'
    assert house.function_lines(source) == [(4, "f"), (2, "g")]


def test_public_functions_are_those_that_a_reader_may_call() -> None:
    source = '''
def told():
    """Yes."""
    def nested(): ...
def untold(): ...
def _private(): ...
class _Private:
    def method(self): ...
class Public:
    def __init__(self): ...
    @property
    def size(self):
        """Yes."""
'''
    assert round(house.documented({"a": source})) == 67  # told, untold, size


def test_fragments_are_docstrings_of_anything() -> None:
    source = '"""What it is."""\nX = 1\n"""Of X."""\ndef f():\n    """Whatever it is."""\n    return "What is it"\n'
    assert house.fragments(source) == ["What it is.", "Of X."]


def test_words_that_switch_off_the_type_checker_are_counted() -> None:
    source = "from typing import Any, cast\nx: dict[str, Any] = cast(int, y)  # type: ignore[misc]\nAnything = broadcast(x)\n"
    assert house.untyped(source) == {"Any": 2, "cast(": 1, "type: ignore": 1}


def test_private_names_of_lightning_are_found_on_its_objects_alone() -> None:
    source = "from lightning.a import _b\ntrainer.fit_loop._data_fetcher\nself._data_fetcher\nother._no_name_of_theirs\nx._results\n"
    assert house.private_names({"a": source}) == {"_b", "_data_fetcher", "_results"}
    assert house.private_names({"a": source, "b": "def _results(): ..."}) == {"_b", "_data_fetcher"}


def test_a_figure_beyond_its_limit_is_marked() -> None:
    limits = {UNTYPED: Limit(3), "depth": Limit(3, held=5), "share": Limit(85, least=True)}
    fine, waiting, broken = house.table({UNTYPED: Figure(3), "depth": Figure(5), "share": Figure(84)}, limits).splitlines()[1:]
    assert fine.split()[-3:] == ["3", "<=", "3"]
    assert waiting.endswith("5   <=   5  NOT MET YET: <= 3 is wanted") and broken.endswith("BROKEN")
