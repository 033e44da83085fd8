"""Memory of every shipped recipe on each of its GPUs, as `python -m lit_rl.doctor` estimates it from configs of the published sizes.

    python -m benchmarks.memory

Prints the table of docs/memory.md: what a GPU holds at the fullest moment, in which phase that is, and whether it fits. Takes minutes.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import lightning as L

from benchmarks.house import ROOT, shipped
from lit_rl.doctor.memory import TIGHT, Estimate, estimate
from lit_rl.doctor.placement import GIB, Placement
from lit_rl.doctor.runs import Run, parse
from lit_rl.miniatures.published import Published, write_configs
from lit_rl.modules.base import LitRL

MODELS: Mapping[str, Published] = {
    "Qwen/Qwen2.5-7B": "qwen25_7b",
    "Qwen/Qwen2.5-7B-Instruct": "qwen25_7b",
    "Qwen/Qwen2.5-Math-7B": "qwen25_math_7b",
    "Qwen/Qwen2.5-VL-7B-Instruct": "qwen25_vl_7b",
    "Qwen/Qwen3-VL-4B-Instruct": "qwen3_vl_4b",
    "Qwen/Qwen3-VL-32B-Instruct": "qwen3_vl_32b",
    "Skywork/Skywork-Reward-V2-Qwen3-0.6B": "qwen3_06b_reward",
    "stabilityai/stable-diffusion-3.5-medium": "sd35_medium",
    "black-forest-labs/FLUX.1-dev": "flux_dev",
    "black-forest-labs/FLUX.1-Fill-dev": "flux_fill",
    "google/siglip-so400m-patch14-384": "siglip",
    "yuvalkirstain/PickScore_v1": "clip_h",
    "openai/clip-vit-large-patch14": "clip_l",
}
"""Sizes of the models that shipped recipes name."""
NAMED = {
    "SD3_5_MODEL_NAME_OR_PATH": "deepgen/sd3",
    "QWEN2_5_VL_MODEL_NAME_OR_PATH": "deepgen/language",
    "CHECKPOINT": "deepgen/checkpoint.pth",
    "CLIP_MODEL_NAME_OR_PATH": "clip_l",
    "SFTAUX_DATASET_CONFIG": "pictures.yaml",
    "DATASET_CONFIG": "prompts.yaml",
}
"""Variables of the environment by which DeepGen's recipes name their files, and where these are in the folder of models."""


@dataclass(frozen=True)
class Recipe:
    """A shipped run with the placement that its first lines name."""

    path: Path
    base: str
    gpus: int

    @property
    def name(self) -> str:
        return f"{self.path.parent.name}/{self.path.stem}"


def recipes() -> list[Recipe]:
    """All but the demos."""
    return [_recipe(path) for path in shipped() if path.parent.name != "demo"]


def _recipe(path: Path) -> Recipe:
    head = "\n".join(line for line in path.read_text().splitlines()[:5] if line.startswith("#"))
    stated, gpus = re.search(r"With configs/base/(\w+)\.yaml", head), re.search(r"on (\d+) GPUs", head)
    count = int(gpus[1]) if gpus else 1
    return Recipe(path, stated[1] if stated else "ddp" if count > 1 else "one_gpu", count)


def estimated(recipe: Recipe, models: Path) -> Estimate:
    """The memory of a recipe. models: Folder for configs."""
    text = recipe.path.read_text()
    for name, model in MODELS.items():
        if re.search(rf"{re.escape(name)}(?![\w.-])", text):
            text = re.sub(rf"{re.escape(name)}(?![\w.-])", str(write_configs(model, models / model)), text)
    if "DeepGenPolicy" in text:
        write_named(models)
    (file := models / f"{recipe.path.parent.name}_{recipe.path.name}").write_text(text)
    options = ["--config", str(ROOT / f"configs/base/{recipe.base}.yaml"), "--config", str(file), "--trainer.devices", str(recipe.gpus)]
    with patch.dict(os.environ, {name: str(models / place) for name, place in NAMED.items()}):
        run = Run(parse(options), options, [], [])
        callbacks = [run.build(L.Callback, value) for value in run.config.trainer.callbacks]
        placement = Placement.of(run.config.trainer, processes=recipe.gpus, gpu=True)
        return estimate(run.build(LitRL, run.config.model), placement, data=run.config.data, callbacks=callbacks)


def write_named(models: Path) -> None:
    """The files that the environment names, where they are not there yet: sizes of DeepGen and CLIP, and a list of one picture."""
    for model in ("deepgen", "clip_l"):
        if not (models / model).is_dir():
            write_configs(model, models / model)
    (models / "pictures.json").write_text(json.dumps([{"image_path": "a.png", "txt": "a"}]))
    (models / "pictures.yaml").write_text("sources: [{path: pictures.json}]")


def row(recipe: Recipe, found: Estimate) -> str:
    """A row of the table."""
    gib = found.total / GIB
    card = next((card for card in (24, 80, 141) if gib <= TIGHT * card), None)
    return f"| `{recipe.name}` | `{recipe.base}`, {recipe.gpus} | {gib:.0f} | {found.fullest} | {card or 'none'} |"


def rows() -> Iterator[str]:
    """The table of docs/memory.md."""
    yield from (
        "| recipe | `configs/base`, GPUs | GiB on each | fullest phase | fits on a card of GiB |",
        "| --- | --- | --- | --- | --- |",
    )
    with tempfile.TemporaryDirectory() as folder:
        for recipe in recipes():
            yield row(recipe, estimated(recipe, Path(folder)))


def told() -> dict[str, str]:
    """Rows of docs/memory.md by recipe."""
    lines = (ROOT / "docs/memory.md").read_text().splitlines()
    return {found[1]: line for line in lines if (found := re.match(r"\| `(\w+/\w+)` \|", line))}


if __name__ == "__main__":
    for line in rows():
        print(line, flush=True)
