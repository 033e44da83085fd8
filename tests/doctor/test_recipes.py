"""Every shipped recipe has its memory told, on the GPUs that its first lines name, by configs of the published sizes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import lightning as L
import pytest
import yaml
from fill import HEIGHT, WIDTH, build_fill

from benchmarks.house import shipped
from benchmarks.memory import Recipe, estimated, recipes, row, told
from lit_rl.doctor.memory import TIGHT, estimate
from lit_rl.doctor.placement import GIB, Placement
from lit_rl.doctor.runs import Run, parse
from lit_rl.miniatures.deepgen import build_deepgen
from lit_rl.miniatures.images import build_sd3
from lit_rl.miniatures.lm import build_lm
from lit_rl.miniatures.vlm import build_vlm
from lit_rl.modules.base import LitRL

DEMOS = [path for path in shipped() if path.parent.name == "demo"]
FULL = {"diffusion_nft/flux_fill_text", "flow_grpo/flux_fill_text"}
"""Recipes that say in their first lines that they want more than 80 GiB."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_page_has_every_recipe_and_says_where_it_fits() -> None:
    page = {name: cells(line) for name, line in told().items()}
    assert page.keys() == {recipe.name for recipe in recipes()}
    fitting = {name for name, (_, _, size, _, _) in page.items() if float(size) <= TIGHT * 80}
    assert page.keys() - fitting == FULL
    assert all(int(card) >= float(size) for _, _, size, _, card in page.values())


def unlike() -> list[Recipe]:
    """Recipes until each policy, placement and fullest phase is among them: others combine the same computations."""
    page, traits = told(), dict[str, set[str]]()
    for recipe in recipes():
        policy = yaml.safe_load(recipe.path.read_text())["model"]["init_args"]["policy"]["class_path"]
        _, _, _, fullest, _ = cells(page[recipe.name])
        traits[recipe.name] = {policy, recipe.base, fullest}
    left, found = set[str]().union(*traits.values()), list[str]()
    while left:
        found.append(max(traits, key=lambda name: len(traits[name] & left)))
        left -= traits[found[-1]]
    return [recipe for recipe in recipes() if recipe.name in found]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", unlike(), ids=lambda recipe: recipe.name)
def test_a_recipe_holds_what_the_page_says(recipe: Recipe, models: Path) -> None:
    """Within a GiB; each takes seconds, as the doctor does."""
    found = estimated(recipe, models)
    mine, page = cells(row(recipe, found)), cells(told()[recipe.name])
    assert (mine[:2], mine[3:]) == (page[:2], page[3:]), mine
    assert found.total / GIB == pytest.approx(float(page[2]), abs=1)


BUILT: Mapping[str, Callable[[Path], object]] = {
    "lm": lambda folder: build_lm(folder / "lm"),
    "ocr": lambda folder: build_sd3(folder / "ocr", height=32, width=64, layers=2, t5_hidden=None),
    "fill": lambda folder: build_fill(folder / "fill"),
    "agent": lambda folder: build_vlm(folder / "agent", family="qwen3_vl", max_side=96),
    "deepgen": lambda folder: build_deepgen(folder / "deepgen", height=16, width=16, adapter_rank=None),
}


@pytest.mark.parametrize("path", DEMOS, ids=lambda path: path.stem)
def test_a_demo_s_memory_is_told(path: Path, models: Path) -> None:
    kind = next((kind for kind in ("fill", "ocr", "deepgen", "agent") if kind in path.stem), "lm")
    if not (models / kind).is_dir():
        BUILT[kind](models)
    folder = models / kind
    text = path.read_text().replace("outputs/demo-deepgen/model", str(folder))
    text = re.sub(r"pretrained: outputs/[\w/-]+", f"pretrained: {folder / 'pipeline' if kind == 'fill' else folder}", text)
    (file := models / path.name).write_text(re.sub(r"encoder: outputs/[\w/-]+", f"encoder: {folder / 'siglip'}", text))
    options = ["--config", str(file)]
    if kind == "fill":
        options += ["--model.policy.resolution", f"[{HEIGHT}, {WIDTH}]"]
    run = Run(parse(options), options, [], [])
    callbacks = [run.build(L.Callback, value) for value in run.config.trainer.callbacks]
    method = run.build(LitRL, run.config.model)
    found = estimate(method, Placement.of(run.config.trainer, processes=1, gpu=False), data=run.config.data, callbacks=callbacks)
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)  # a critic's too, which the estimate has loaded
    always = {line.what: line.bytes for line in found.lines if not line.phase}
    kept = sum(size for what, size in always.items() if what.startswith("weights of") and what.endswith("trained"))
    assert kept == 4 * trained and always["moments of AdamW"] >= 8 * trained
    assert found.of("training") > 4 * 4 * trained
